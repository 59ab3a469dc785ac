//! Why a header could not be taken.

use alloc::string::String;
use core::fmt;

/// What kind of trouble it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A version, value or variant that this library does not know.
    Unsupported,
    /// A value that no image may have.
    Corrupt,
}

/// A header that could not be taken, with one clause that names the field and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    /// The kind of trouble.
    pub trouble: Trouble,
    /// One clause.
    pub text: String,
}

impl FormatError {
    pub(crate) fn corrupt(text: impl Into<String>) -> Self {
        Self { trouble: Trouble::Corrupt, text: text.into() }
    }

    pub(crate) fn unsupported(text: impl Into<String>) -> Self {
        Self { trouble: Trouble::Unsupported, text: text.into() }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl core::error::Error for FormatError {}
