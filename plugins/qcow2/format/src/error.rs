//! Why a header could not be taken.

use alloc::string::String;
use core::fmt;

/// What kind of trouble a header has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderErrorKind {
    /// The magic is not that of qcow2.
    NotQcow2,
    /// The file ends within the header or its extensions.
    Truncated,
    /// A version or value that this library does not know.
    Unsupported,
    /// A value that no image may have.
    Corrupt,
}

/// A header that could not be taken: what kind of trouble, where, and one clause about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderError {
    /// The kind of trouble.
    pub kind: HeaderErrorKind,
    /// Byte offset of the field in the file.
    pub offset: u64,
    /// One clause that names the field and its value.
    pub text: String,
}

impl HeaderError {
    pub(crate) fn new(kind: HeaderErrorKind, offset: u64, text: impl Into<String>) -> Self {
        Self { kind, offset, text: text.into() }
    }

    pub(crate) fn corrupt(offset: u64, text: impl Into<String>) -> Self {
        Self::new(HeaderErrorKind::Corrupt, offset, text)
    }
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl core::error::Error for HeaderError {}
