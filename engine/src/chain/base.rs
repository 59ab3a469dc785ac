//! Which file is committed into.

use super::open::{Access, ChainImage, Identity, OpenedFile};
use super::write_target::{is_protocol, Gate, NotAllowed};
use crate::cli::escape::escape_bytes;
use crate::cli::CliError;
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{BackingPointer, ImageFacts};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What the operator says about the backing.
#[derive(Clone, Copy, Debug)]
pub struct BackingChoice<'a> {
    /// `-b`: the file that the operator named.
    pub base: Option<&'a Path>,
    /// Where recorded names may lead.
    pub gate: &'a Gate,
}

/// Refusal of a recorded name, with what to do.
pub(super) fn not_allowed(image: &Path, error: &NotAllowed, option: &str) -> CliError {
    CliError::image(image, ErrorCode::WriteTargetNotAllowed, format!("{}: {option}", error.0))
}

/// Open the backing of an overlay: the file that `-b` names, which must be the overlay's immediate parent, or the one
/// that the overlay records.
///
/// # Errors
/// [`ErrorCode::NoBacking`], [`ErrorCode::NotInChain`], [`ErrorCode::WriteTargetNotAllowed`], and what opening gives.
pub fn resolve_backing<'r>(
    registry: &'r Registry,
    overlay: &ChainImage<'_>,
    choice: BackingChoice<'_>,
) -> Result<ChainImage<'r>, CliError> {
    let path = &overlay.opened.path;
    let Some(pointer) = overlay.facts.backing.as_ref().into_option() else {
        let clause = "has no recorded backing file, so there is nothing to commit into";
        return Err(CliError::image(path, ErrorCode::NoBacking, clause));
    };
    let directory = overlay.opened.directory();
    let opened = match choice.base {
        None => {
            let located = choice.gate.locate(&directory, &pointer.name).map_err(|error| {
                not_allowed(path, &error, "name the backing with -b, or allow its directory with --allow-backing-dir")
            })?;
            OpenedFile::located(&located, Access::ReadWrite)?
        }
        Some(base) => open_base(registry, overlay, pointer, &directory.join(base), choice.gate)?,
    };
    let same = opened.identity == overlay.opened.identity;
    if same {
        return Err(CliError::image(path, ErrorCode::ChainLoop, "is its own backing file"));
    }
    opened.lock(Access::ReadWrite)?.identify_recorded(registry, recorded_format(&overlay.facts))
}

/// The format that an image records for its backing.
pub(super) fn recorded_format(facts: &ImageFacts) -> Option<&[u8]> {
    let pointer = facts.backing.as_ref().into_option()?;
    pointer.format.as_ref().into_option().map(|format| format.as_slice())
}

/// The identity of a file that is only looked at.
fn identity(path: &Path) -> Option<Identity> {
    std::fs::metadata(path).ok().map(|metadata| Identity::of(&metadata))
}

/// Open the file that `-b` names, which must be the overlay's immediate parent: the file that is open is compared, so that
/// nobody can put another one in its place.
fn open_base(
    registry: &Registry,
    overlay: &ChainImage<'_>,
    pointer: &BackingPointer,
    target: &Path,
    gate: &Gate,
) -> Result<OpenedFile, CliError> {
    let name = escape_bytes(&pointer.name);
    let opened = match OpenedFile::named(target, Access::ReadWrite, ErrorCode::BackingNotFound) {
        Err(error) if error.code == ErrorCode::BackingNotFound => {
            let clause = format!(
                "does not exist (a relative name begins at the overlay's directory); the overlay's immediate parent is {name}"
            );
            return Err(CliError::image(target, error.code, clause));
        }
        other => other?,
    };
    // The recorded name is only compared here, by what it leads to; what is opened is the operator's own name.
    let parent = overlay.opened.directory().join(OsStr::from_bytes(&pointer.name));
    if !is_protocol(&pointer.name) && identity(&parent) == Some(opened.identity) {
        return Ok(opened);
    }
    if is_deeper(registry, overlay, opened.identity, gate) {
        let clause = format!(
            "committing into a deeper ancestor is not there yet: the overlay's immediate parent is {name}; commit into that"
        );
        return Err(CliError::image(target, ErrorCode::NotImplemented, clause));
    }
    let clause = format!("is not in the backing chain of the overlay: the overlay's immediate parent is {name}");
    Err(CliError::image(target, ErrorCode::NotInChain, clause))
}

/// Whether `wanted` lies below the overlay's parent. Whatever may not, or cannot, be followed ends the search.
fn is_deeper(registry: &Registry, overlay: &ChainImage<'_>, wanted: Identity, gate: &Gate) -> bool {
    let mut directory = overlay.opened.directory();
    let mut facts = overlay.facts.clone();
    for _ in 0..instar_guest_abi::MAX_CHAIN_DEVICES {
        let Some(pointer) = facts.backing.as_ref().into_option() else { return false };
        let Ok(located) = gate.locate(&directory, &pointer.name) else { return false };
        let Ok(opened) = OpenedFile::located(&located, Access::ReadOnly) else { return false };
        if opened.identity == wanted {
            return true;
        }
        directory = opened.directory();
        let Ok(image) = opened.identify_recorded(registry, recorded_format(&facts)) else { return false };
        facts = image.facts;
    }
    false
}
