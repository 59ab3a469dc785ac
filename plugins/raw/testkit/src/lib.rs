//! Raw images in memory, for tests: the file is the disk.

use instar_guest_abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{Builder, Held, Layer};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Sink, Source};
use instar_raw_driver::Raw;
use instar_testkit::chain::units;
use instar_testkit::{sink_of, source_of, ByteOrder, Disk, FormatKit, ImageKit, Layout, Parts, Place, SECTOR};

/// raw.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Raw>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Raw>(io, device, has_backing)
    }

    fn info(&self, bytes: &[u8]) -> ImageInfo {
        ImageInfo { virtual_size: (bytes.len() as u64).next_multiple_of(SECTOR as u64), cluster_size: 1 }
    }

    /// The last sector of a disk is a whole one.
    fn content(&self, bytes: &[u8], _: Option<&[u8]>) -> Vec<u8> {
        let mut disk = bytes.to_vec();
        disk.resize(disk.len().next_multiple_of(SECTOR), 0);
        disk
    }

    fn can_grow(&self) -> bool {
        true
    }

    fn can_empty(&self) -> bool {
        false
    }
}

impl Builder for Kit {
    fn cluster(&self) -> u64 {
        SECTOR as u64
    }

    fn states(&self) -> &[Held] {
        &[Held::Data, Held::Zero]
    }

    fn build(&self, layer: &Layer) -> Vec<u8> {
        layer.content(&[])
    }
}

impl FormatKit for Kit {
    fn layout(&self, _: &[u8]) -> Layout {
        Layout::new(ByteOrder::Little, 1, &[])
    }

    fn salvage(&self, bytes: &[u8]) -> Option<Disk> {
        let mut disk = Disk::new((bytes.len() as u64).next_multiple_of(SECTOR as u64))?;
        disk.hold(0, disk.length, bytes);
        Some(disk)
    }

    fn has_metadata(&self) -> bool {
        false
    }

    fn drawn(&self, random: &mut Random, place: Place) -> Option<Vec<u8>> {
        let mut bytes = vec![0; place.size];
        for (sector, seed) in units(random, place.size / SECTOR) {
            bytes[sector * SECTOR..(sector + 1) * SECTOR].fill(seed ^ sector.to_le_bytes()[0] | 1);
        }
        (!place.has_parent).then_some(bytes)
    }

    /// Backings as long as the disk, and shorter ones.
    fn parts(&self, size: usize) -> Parts {
        let raw = |length: usize| (0..length).map(|at| (at / 300).to_le_bytes()[0] | 1).collect::<Vec<u8>>();
        let backings = vec![raw(size), raw(size.saturating_sub(700)), raw(size / 2)];
        Parts { backings, ..Parts::default() }
    }
}
