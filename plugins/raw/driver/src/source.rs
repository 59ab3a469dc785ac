//! The source role: what a raw image holds below others.

use crate::verified;
use core::ops::Range;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageInfo};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Extent, Extents, Source};

/// A raw image that data comes from.
#[derive(Debug)]
pub struct RawSource {
    device: u32,
    virtual_size: u64,
    file_length: u64,
}

impl RawSource {
    /// The image on this device.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] when file and disk do not have the same length.
    pub fn open(device: &DeviceConfig) -> DriverResult<Self> {
        verified(device)?;
        Ok(Self { device: device.device, virtual_size: device.virtual_size, file_length: device.file_length })
    }
}

fn no_overlay() -> DriverError {
    DriverError::new(ErrorCode::UnsupportedFormat, "a raw image has no backing to be committed into")
}

impl Source for RawSource {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.virtual_size, cluster_size: 1 }
    }

    fn verify(&mut self, _: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty {
            return Err(no_overlay());
        }
        Ok(0)
    }

    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let from = range.start;
        let end = self.file_length.max(from);
        let in_file = Extent::data(from, end - from, self.device, from);
        let behind = Extent::zero(end, self.virtual_size.saturating_sub(end));
        for extent in [in_file, behind] {
            if extent.length > 0 && !out.push(extent) {
                return Ok(extent.guest_offset);
            }
        }
        Ok(self.virtual_size)
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Err(DriverError::new(ErrorCode::InternalOverflow, "a raw image has nothing to decode"))
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Err(no_overlay())
    }
}
