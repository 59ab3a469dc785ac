//! Which image is committed into.

use super::error::CommitError;
use crate::chain::{admit, chain_contains, next_in_chain, protocol_of, refuse_loop, ChainImage, Gate, Recorded};
use crate::cli::escape::{escape_bytes, escape_path};
use crate::devices::lock::LockMode;
use crate::devices::{Access, FileIdentity, ImageFile, OpenError};
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::BackingPointer;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Open the image that is committed into, lock it, and find out what it is: the one that the operator named, which must
/// be the overlay's immediate parent, or the recorded one, if it may be followed.
///
/// # Errors
/// Whatever stands in the way; nothing is changed.
pub fn resolve_backing<'r>(
    registry: &'r Registry,
    overlay: &ChainImage<'_>,
    base: Option<&OsStr>,
    gate: &Gate,
) -> Result<ChainImage<'r>, CommitError> {
    let Some(pointer) = overlay.backing() else {
        let clause = "no recorded backing file: there is nothing to commit into";
        return Err(CommitError::image(overlay.path(), ErrorCode::NoBacking, clause));
    };
    let file = match base {
        Some(base) => open_base(registry, overlay, pointer, base, gate)?,
        None => {
            let access = Access::ReadWrite;
            let file = next_in_chain(overlay.path(), &overlay.directory, pointer, gate, access)?;
            refuse_loop(&file, overlay.path(), &[overlay.file.identity()])?;
            file
        }
    };
    let format = pointer.format.as_ref().into_option().map(|format| format.as_slice());
    admit(registry, file, LockMode::Write, Recorded::Image(format, overlay.path()))
}

/// Open the image that the operator named. A relative name begins at the overlay's directory.
fn open_base(
    registry: &Registry,
    overlay: &ChainImage<'_>,
    pointer: &BackingPointer,
    base: &OsStr,
    gate: &Gate,
) -> Result<ImageFile, CommitError> {
    let parent = format!("the overlay's immediate parent is {}", escape_bytes(&pointer.name));
    if let Some(protocol) = protocol_of(base.as_bytes()) {
        let clause = format!("-b names the protocol '{protocol}:', and only files are committed into; {parent}");
        return Err(CommitError::image(overlay.path(), ErrorCode::WriteTargetNotAllowed, clause));
    }
    let path = overlay.directory.join(Path::new(base));
    let file = if base.is_empty() { Err(OpenError::NotFound) } else { ImageFile::open(&path, Access::ReadWrite) };
    let file = file.map_err(|error| match error {
        OpenError::NotFound => {
            let clause = format!("does not exist (a relative name begins at the overlay's directory); {parent}");
            CommitError::image(&path, ErrorCode::BackingNotFound, clause)
        }
        error => CommitError::image(&path, ErrorCode::OpenFailed, error),
    })?;
    if file.identity() == overlay.file.identity() {
        // Named so by the operator, or also recorded so.
        if recorded_identity(overlay, pointer) == Some(file.identity()) {
            refuse_loop(&file, overlay.path(), &[overlay.file.identity()])?;
        }
        let clause = format!("it is the overlay itself; {parent}");
        return Err(CommitError::image(&path, ErrorCode::NotInChain, clause));
    }
    if recorded_identity(overlay, pointer) == Some(file.identity()) {
        return Ok(file);
    }
    let overlay_name = escape_path(overlay.path());
    if chain_contains(registry, overlay, file.identity(), gate) {
        let clause = format!(
            "committing '{overlay_name}' into a deeper ancestor is not there yet: commit layer by layer; {parent}"
        );
        return Err(CommitError::image(&path, ErrorCode::NotImplemented, clause));
    }
    let clause = format!("it is not in the backing chain of '{overlay_name}'; {parent}");
    Err(CommitError::image(&path, ErrorCode::NotInChain, clause))
}

/// Which file the recorded name leads to. It is only compared with the one that the operator named, never opened.
fn recorded_identity(overlay: &ChainImage<'_>, pointer: &BackingPointer) -> Option<FileIdentity> {
    if protocol_of(&pointer.name).is_some() || pointer.name.contains(&0) {
        return None;
    }
    let name = OsString::from(OsStr::from_bytes(&pointer.name));
    let stat = rustix::fs::stat(overlay.directory.join(Path::new(&name))).ok()?;
    Some(FileIdentity::of(&stat))
}
