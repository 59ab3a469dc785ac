//! The guest half of the raw plugin: the file is the disk.
//!
//! There is no metadata to verify, and none to keep consistent: byte `n` of the disk is byte `n` of the file.
#![no_std]

extern crate alloc;

mod sink;
mod source;

pub use sink::RawSink;
pub use source::RawSource;

use alloc::format;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, FormatDriver};

/// Disks are made of sectors of this many bytes; a file that ends within one is a disk that is rounded up, as in QEMU.
const SECTOR: u64 = 512;

/// The raw format.
pub struct Raw;

impl FormatDriver for Raw {
    type Source = RawSource;
    type Sink = RawSink;

    fn open_source(_: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<RawSource> {
        RawSource::open(device)
    }

    fn open_sink(_: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<RawSink> {
        RawSink::open(device)
    }
}

/// The virtual size in bytes that the host saw, which follows from the length of the file.
fn verified(device: &DeviceConfig) -> DriverResult<()> {
    if device.file_length.div_ceil(SECTOR).checked_mul(SECTOR) == Some(device.virtual_size) {
        return Ok(());
    }
    let text = format!("the file has {} bytes, the disk {}", device.file_length, device.virtual_size);
    Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(device.device, 0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_guest_sdk::memory::MemoryDevices;
    use instar_guest_sdk::{Extent, Extents, Source};

    fn device(file_length: u64, virtual_size: u64) -> DeviceConfig {
        DeviceConfig { device: 3, file_length, virtual_size, ..DeviceConfig::default() }
    }

    #[test]
    fn the_last_sector_of_an_odd_file_is_filled_with_zeroes() {
        let mut io = MemoryDevices::default();
        let mut source = Raw::open_source(&mut io, &device(1000, 1024)).unwrap();
        let mut extents = Extents::with_room_for(8);
        assert_eq!(source.extents(&mut io, 100..1024, &mut extents), Ok(1024));
        assert_eq!(*extents, [Extent::data(100, 900, 3, 100), Extent::zero(1000, 24)]);
        let mut one = Extents::with_room_for(1);
        assert_eq!(source.extents(&mut io, 0..1024, &mut one), Ok(1000));
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
