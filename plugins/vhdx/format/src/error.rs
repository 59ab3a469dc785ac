//! Why an image could not be taken.

use alloc::string::String;
use core::fmt;

/// What kind of reason it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The image may be fine: this library does not know it.
    Unsupported,
    /// No image may say this.
    Corrupt,
}

/// A structure that cannot be taken: where, and one clause that names the field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    /// What kind of reason it is.
    pub trouble: Trouble,
    /// The byte of the file at which the structure stands.
    pub offset: u64,
    /// One clause without a final stop.
    pub text: String,
}

impl FormatError {
    pub(crate) fn corrupt(offset: u64, text: impl Into<String>) -> Self {
        Self { trouble: Trouble::Corrupt, offset, text: text.into() }
    }

    pub(crate) fn unsupported(offset: u64, text: impl Into<String>) -> Self {
        Self { trouble: Trouble::Unsupported, offset, text: text.into() }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl core::error::Error for FormatError {}

/// Why an image could not be opened: for what it says, or because it could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError<E> {
    /// What it says.
    Format(FormatError),
    /// The reader's error.
    Read(E),
}

/// Reads from a byte of the file; zeroes past its end.
pub type Read<'a, E> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<(), E>;

impl<E> From<FormatError> for LoadError<E> {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}
