//! Looking at the overlay.

use super::error::CommitError;
use crate::chain::{admit, ChainImage, Recorded};
use crate::devices::lock::LockMode;
use crate::devices::{Access, ImageFile, OpenError};
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use std::path::Path;

/// Open the overlay, lock it, and find out what it is.
///
/// # Errors
/// When it does not exist, cannot be opened for writing, is in use, or is not of the named format.
pub fn probe_commit_target<'r>(
    registry: &'r Registry,
    path: &Path,
    format_hint: Option<&str>,
) -> Result<ChainImage<'r>, CommitError> {
    let file = ImageFile::open(path, Access::ReadWrite).map_err(|error| {
        let code = if error == OpenError::NotFound { ErrorCode::OverlayNotFound } else { ErrorCode::OpenFailed };
        CommitError::image(path, code, error)
    })?;
    admit(registry, file, LockMode::Write, Recorded::Operator(format_hint))
}
