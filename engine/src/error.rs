//! How a command fails.

use crate::plugins::{IdentifyError, PluginFailure};
use instar_guest_abi::ErrorCode;
use std::fmt;
use std::path::Path;

/// Why a command failed: a code, and one line for people that names the file and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// An `ERROR_*` code.
    pub code: ErrorCode,
    /// One line, safe to print on a terminal.
    pub message: String,
}

impl Error {
    /// An error with a code and a line. The line is made safe for a terminal; escape file names in it with
    /// [`escape_path`](crate::escape::escape_path) all the same, so that they are unambiguous.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: crate::escape::printable(&message.into()).into_owned() }
    }

    /// What went wrong with an image.
    pub fn image(path: &Path, code: ErrorCode, clause: impl fmt::Display) -> Self {
        Self::new(code, format!("'{}': {clause}", crate::escape::escape_path(path)))
    }

    /// Why the format of an image is not known.
    #[must_use]
    pub fn identify(path: &Path, error: &IdentifyError) -> Self {
        Self::image(path, error.code(), error)
    }

    /// Why a plugin gave no answer about an image.
    #[must_use]
    pub fn plugin(path: &Path, failure: &PluginFailure) -> Self {
        Self::image(path, failure.code(), failure)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
