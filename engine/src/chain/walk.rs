//! Down the chain.

use super::directory::ImageDirectory;
use super::image::{admit, identify, ChainImage, Recorded};
use super::write_target::{decide, open_beneath, TargetError};
use crate::cli::escape::escape_bytes;
use crate::commit::CommitError;
use crate::devices::lock::LockMode;
use crate::devices::{Access, FileIdentity, ImageFile, OpenError};
use crate::plugins::Registry;
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use instar_plugin_api::BackingPointer;
use std::path::Path;

/// Most images that are looked at to find one that `-b` names.
const MAX_LOOKED_AT: usize = 256;

/// Which directories recorded names may lead into, besides that of the image that records them.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// Those that the operator allowed.
    pub allowed: Vec<ImageDirectory>,
}

impl Gate {
    /// The same, and this one.
    #[must_use]
    pub fn with(&self, directory: &ImageDirectory) -> Self {
        let mut allowed = self.allowed.clone();
        allowed.push(directory.clone());
        Self { allowed }
    }
}

/// Open the image that `pointer`, recorded in the image `above` in `home`, names.
///
/// # Errors
/// [`ErrorCode::WriteTargetNotAllowed`] at the gate, [`ErrorCode::BackingNotFound`], [`ErrorCode::OpenFailed`].
pub fn next_in_chain(
    above: &Path,
    home: &ImageDirectory,
    pointer: &BackingPointer,
    gate: &Gate,
    access: Access,
) -> Result<ImageFile, CommitError> {
    let name = escape_bytes(&pointer.name);
    // The names that reach this are a few, the hostile ones are cut.
    let shown: String = name.chars().take(300).collect();
    let closed = |clause: &dyn std::fmt::Display, protocol: bool| {
        let remedy = match access {
            Access::ReadWrite if protocol => "name a file with -b, or convert it",
            Access::ReadWrite => "name it with -b, or allow its directory with --allow-backing-dir",
            Access::ReadOnly if protocol => "convert it to a file",
            Access::ReadOnly => "allow its directory with --allow-backing-dir",
        };
        let clause = format!("its backing file '{shown}' is not followed: {clause}; {remedy}");
        CommitError::image(above, ErrorCode::WriteTargetNotAllowed, clause)
    };
    let target = decide(home, &gate.allowed, &pointer.name)
        .map_err(|refusal| closed(&refusal, matches!(refusal, super::NameRefusal::Protocol(_))))?;
    open_beneath(&target, access).map_err(|error| match error {
        TargetError::Open(error) => {
            let code = if error == OpenError::NotFound { ErrorCode::BackingNotFound } else { ErrorCode::OpenFailed };
            let recorded_by = crate::cli::escape::escape_path(above);
            CommitError::image(&target.shown, code, format!("{error} (it is the backing file of '{recorded_by}')"))
        }
        error => closed(&error, false),
    })
}

/// The ancestors of `backing`, nearest first, each opened for reading, locked and known. `taken` are the images that are
/// part of the commit already.
///
/// # Errors
/// [`ErrorCode::ChainLoop`], [`ErrorCode::ChainTooDeep`], and the errors of [`next_in_chain`] and [`admit`].
pub fn discover_backing_chain<'r>(
    registry: &'r Registry,
    backing: &ChainImage<'_>,
    taken: &[FileIdentity],
    gate: &Gate,
) -> Result<Vec<ChainImage<'r>>, CommitError> {
    let mut seen = taken.to_vec();
    let mut ancestors: Vec<ChainImage<'r>> = Vec::new();
    loop {
        let (above, home, pointer) = match ancestors.last() {
            Some(last) => (last.path(), &last.directory, last.backing()),
            None => (backing.path(), &backing.directory, backing.backing()),
        };
        let Some(pointer) = pointer else { return Ok(ancestors) };
        // Slot 0 is the overlay's.
        if ancestors.len() + 1 == MAX_CHAIN_DEVICES {
            let clause = format!(
                "the backing chain goes on below it, and at most {MAX_CHAIN_DEVICES} images besides the one that is \
                 committed into are possible: commit or rebase the images above it first"
            );
            return Err(CommitError::image(above, ErrorCode::ChainTooDeep, clause));
        }
        let file = next_in_chain(above, home, pointer, gate, Access::ReadOnly)?;
        refuse_loop(&file, above, &seen)?;
        seen.push(file.identity());
        let format = pointer.format.as_ref().into_option().map(|format| format.as_slice());
        let image = admit(registry, file, LockMode::Read, Recorded::Image(format, above))?;
        ancestors.push(image);
    }
}

/// Refuse an image that is part of the chain already.
pub(crate) fn refuse_loop(file: &ImageFile, above: &Path, seen: &[FileIdentity]) -> Result<(), CommitError> {
    if !seen.contains(&file.identity()) {
        return Ok(());
    }
    let clause = format!(
        "the backing chain leads back to it: '{}' records it as its backing file; rebase one of them",
        crate::cli::escape::escape_path(above)
    );
    Err(CommitError::image(file.path(), ErrorCode::ChainLoop, clause))
}

/// Whether an image is somewhere below `top`, as far as recorded names may be followed. Only looks.
#[must_use]
pub fn chain_contains(registry: &Registry, top: &ChainImage<'_>, wanted: FileIdentity, gate: &Gate) -> bool {
    let (mut above, mut home, mut pointer) = (top.path().to_owned(), top.directory.clone(), top.backing().cloned());
    for _ in 0..MAX_LOOKED_AT {
        let Some(current) = pointer.take() else { return false };
        let Ok(file) = next_in_chain(&above, &home, &current, gate, Access::ReadOnly) else { return false };
        if file.identity() == wanted {
            return true;
        }
        let format = current.format.as_ref().into_option().map(|format| format.as_slice());
        let Ok((_, facts)) = identify(registry, &file, Recorded::Image(format, &above)) else { return false };
        let Ok(directory) = ImageDirectory::of_image(file.path()) else { return false };
        above = file.path().to_owned();
        home = directory;
        pointer = facts.backing.into_option();
    }
    false
}
