//! How a commit fails.

use crate::cli::escape::{escape_path, printable};
use instar_guest_abi::ErrorCode;
use std::fmt;
use std::path::Path;

/// Why a commit was refused or failed: a code, and one line that names the file and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitError {
    /// An `ERROR_*` code.
    pub code: ErrorCode,
    /// One line, safe to print on a terminal.
    pub message: String,
}

impl CommitError {
    /// An error with a code and a line. Whatever would move a cursor is escaped.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: printable(&message.into()).into_owned() }
    }

    /// What went wrong with an image.
    pub fn image(path: &Path, code: ErrorCode, clause: impl fmt::Display) -> Self {
        Self::new(code, format!("'{}': {clause}", escape_path(path)))
    }
}

impl fmt::Display for CommitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CommitError {}
