//! How the driver fails.

use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::DriverError;
use instar_vhd_format::{FormatError, Trouble};

/// A [`FormatError`] at a byte of a device; `corrupt` is the code of what no image may say.
pub fn at(corrupt: ErrorCode, device: u32, offset: u64) -> impl Fn(FormatError) -> DriverError {
    move |error| {
        let code = if error.trouble == Trouble::Corrupt { corrupt } else { ErrorCode::UnsupportedFormat };
        DriverError::new(code, error.text).at(device, offset)
    }
}
