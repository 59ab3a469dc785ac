//! How a call between modules tells why it failed.

/// Longest detail text of a [`Failure`] in bytes.
pub const FAILURE_TEXT_MAX: usize = 208;

/// Why a call failed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Failure {
    /// An `ERROR_*` code.
    pub code: u32,
    /// The device concerned, or `u32::MAX`.
    pub device: u32,
    /// Byte offset on the device, or `u64::MAX`.
    pub offset: u64,
    /// errno of the host for an I/O error, else 0.
    pub errno: u32,
    /// Bytes of `text` in use.
    pub text_len: u32,
    /// UTF-8: one clause that names the field and what is wrong with it.
    pub text: [u8; FAILURE_TEXT_MAX],
}

impl Failure {
    /// No failure.
    #[must_use]
    pub const fn none() -> Self {
        Self { code: 0, device: u32::MAX, offset: u64::MAX, errno: 0, text_len: 0, text: [0; FAILURE_TEXT_MAX] }
    }
}
