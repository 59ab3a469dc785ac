//! Opening the images of a commit.

use alloc::boxed::Box;
use instar_guest_sdk::abi::DeviceConfig;
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{DriverResult, Source};

/// Open an image as a source.
pub fn open(operation: &Operation<'_>, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
    Ok(Box::new(operation.format_of(device)?.open_source(device)?))
}
