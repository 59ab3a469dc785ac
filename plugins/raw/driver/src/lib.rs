//! The guest half of the raw plugin: the file is the disk.
//!
//! It offers the source role, because raw images are at the bottom of many chains: what an ancestor holds
//! is read where the backing above it has a gap.
#![no_std]

extern crate alloc;

use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, Extent, ExtentKind, ImageInfo};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, FormatDriver, NoSink, Source};

/// The raw format.
pub struct Raw;

/// A raw image that data comes from.
#[derive(Debug)]
pub struct RawSource {
    device: u32,
    virtual_size: u64,
    file_length: u64,
}

impl FormatDriver for Raw {
    type Source = RawSource;
    type Sink = NoSink;

    fn open_source(_: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<RawSource> {
        // A file whose length is no multiple of a sector is a disk that is rounded up, as in QEMU.
        if device.file_length.div_ceil(512).checked_mul(512) != Some(device.virtual_size) {
            return Err(DriverError::new(
                ErrorCode::HeaderMismatch,
                format!("the file has {} bytes, the disk {}", device.file_length, device.virtual_size),
            )
            .at(device.device, 0));
        }
        Ok(RawSource { device: device.device, virtual_size: device.virtual_size, file_length: device.file_length })
    }
}

fn no_overlay() -> DriverError {
    DriverError::new(ErrorCode::UnsupportedFormat, "a raw image has no backing to be committed into")
}

impl Source for RawSource {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.virtual_size, cluster_size: 1 }
    }

    fn check(&mut self, _: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty {
            return Err(no_overlay());
        }
        Ok(0)
    }

    fn extents(&mut self, _: &mut dyn BlockIo, from: u64, _: usize, out: &mut Vec<Extent>) -> DriverResult<u64> {
        let mut push = |from: u64, end: u64, kind: ExtentKind| {
            if from < end {
                out.push(Extent {
                    guest_offset: from,
                    length: end - from,
                    location: from,
                    kind: kind as u32,
                    device: self.device,
                });
            }
        };
        push(from, self.file_length, ExtentKind::Data);
        push(from.max(self.file_length), self.virtual_size, ExtentKind::Zero);
        Ok(self.virtual_size)
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Err(DriverError::new(ErrorCode::InternalOverflow, "a raw image has nothing to decode"))
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Err(no_overlay())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_guest_sdk::memory::MemoryDevices;

    fn device(file_length: u64, virtual_size: u64) -> DeviceConfig {
        DeviceConfig { device: 3, file_length, virtual_size, ..DeviceConfig::default() }
    }

    #[test]
    fn the_last_sector_of_an_odd_file_is_filled_with_zeroes() {
        let mut io = MemoryDevices::default();
        let mut source = Raw::open_source(&mut io, &device(1000, 1024)).unwrap();
        let mut extents = Vec::new();
        assert_eq!(source.extents(&mut io, 100, 8, &mut extents), Ok(1024));
        let found: Vec<_> = extents.iter().map(|e| (e.guest_offset, e.length, e.location, e.kind)).collect();
        assert_eq!(found, [(100, 900, 100, ExtentKind::Data as u32), (1000, 24, 1000, ExtentKind::Zero as u32)]);
    }

    #[test]
    fn a_size_that_is_not_the_files_is_refused() {
        let mut io = MemoryDevices::default();
        for size in [1000, 512, 2048] {
            let error = Raw::open_source(&mut io, &device(1000, size)).err().map(|e| e.code);
            assert_eq!(error, Some(ErrorCode::HeaderMismatch));
        }
    }
}
