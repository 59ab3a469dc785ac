//! The error of a driver call.

use alloc::format;
use alloc::string::String;
use core::fmt;
use instar_guest_abi::{ErrorCode, Failure, FAILURE_TEXT_MAX};

/// Result of a driver call.
pub type DriverResult<T> = Result<T, DriverError>;

/// The reason why a driver call failed: code, place, and one clause that names the field and its fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverError {
    /// The kind of failure.
    pub code: ErrorCode,
    /// The device concerned.
    pub device: Option<u32>,
    /// Byte offset on the device.
    pub offset: Option<u64>,
    /// errno of the host for an I/O error, else 0.
    pub errno: u32,
    /// One clause without a final stop: "L2 entry 5 points past the end of the file".
    pub text: String,
}

impl DriverError {
    /// Make a failure without a place.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, device: None, offset: None, errno: 0, text: text.into() }
    }

    /// Add the place of the failure: byte `offset` of `device`.
    #[must_use]
    pub fn at(mut self, device: u32, offset: u64) -> Self {
        self.device = Some(device);
        self.offset = Some(offset);
        self
    }

    /// Write the error into the caller's [`Failure`] and return its code. A text that is too long is cut at a character
    /// boundary.
    pub fn store(&self, out: &mut Failure) -> u32 {
        let mut end = self.text.len().min(FAILURE_TEXT_MAX);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        *out = Failure::none();
        out.code = self.code.number();
        out.device = self.device.unwrap_or(u32::MAX);
        out.offset = self.offset.unwrap_or(u64::MAX);
        out.errno = self.errno;
        out.text[..end].copy_from_slice(&self.text.as_bytes()[..end]);
        out.text_len = u32::try_from(end).unwrap_or(0);
        out.code
    }

    /// Read the error that [`DriverError::store`] wrote, in any module. An invalid record becomes an
    /// [`ErrorCode::GuestProtocol`] error.
    #[must_use]
    pub fn load(failure: &Failure) -> Self {
        let end = usize::try_from(failure.text_len).unwrap_or(usize::MAX).min(FAILURE_TEXT_MAX);
        let code = ErrorCode::from_u32(failure.code).unwrap_or(ErrorCode::GuestProtocol);
        Self {
            code,
            device: (failure.device != u32::MAX).then_some(failure.device),
            offset: (failure.offset != u64::MAX).then_some(failure.offset),
            errno: failure.errno,
            text: String::from_utf8_lossy(&failure.text[..end]).into_owned(),
        }
    }
}

/// Make the error of an arithmetic guard: the number named `what` left its range.
#[must_use]
pub fn overflow(what: &str) -> DriverError {
    DriverError::new(ErrorCode::InternalOverflow, format!("{what} is out of range"))
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.text)?;
        if let (Some(device), Some(offset)) = (self.device, self.offset) {
            write!(f, " (device {device}, offset {offset})")?;
        }
        Ok(())
    }
}

impl core::error::Error for DriverError {}
