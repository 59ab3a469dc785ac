//! Disks of one delta extent, as the conformance test knows images.

use crate::delta::{cowd, cowd_content, sesparse, sesparse_content, SeHeld, SE_GRAIN};
use crate::packed::{pack, sink, source, ANY_IDS, EXTENT};
use crate::{delta_chains, delta_layout, delta_salvage, le32, le64};
use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{Builder, Held, ImageKit, Layer};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Sink, Source};
use instar_testkit::{Chain, Disk, FormatKit, Layout, Parts, Place};

/// vmfsSparse, with grains of this many bytes.
pub struct CowdKit(pub usize);

impl ImageKit for CowdKit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        Ok(Box::new(source(io, device)?))
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        Ok(Box::new(sink(io, device, has_backing)?))
    }

    fn info(&self, image: &[u8]) -> ImageInfo {
        let sectors = |at: usize| le32(&image[EXTENT..], at) as u64 * 512;
        ImageInfo { virtual_size: sectors(12), cluster_size: sectors(16) }
    }

    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        cowd_content(&image[EXTENT..], below.unwrap_or_default())
    }

    fn is_sound(&self, image: &[u8]) -> bool {
        delta_layout::cowd_is_sound(image)
    }
}

impl Builder for CowdKit {
    fn cluster(&self) -> u64 {
        self.0 as u64
    }

    fn build(&self, layer: &Layer) -> Vec<u8> {
        // In another order than that of the disk.
        let mut grains: Vec<_> = layer.clusters().map(|(grain, _)| (grain as usize, layer.bytes(grain))).collect();
        grains.reverse();
        let size = layer.size as usize;
        pack(("vmfsSparse", "VMFSSPARSE"), ANY_IDS, size, &cowd(size, self.0, &grains))
    }

    fn states(&self) -> &[Held] {
        &[Held::Nothing, Held::Data]
    }
}

/// seSparse, which is only read.
pub struct SeSparseKit;

impl ImageKit for SeSparseKit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        Ok(Box::new(source(io, device)?))
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        Ok(Box::new(sink(io, device, has_backing)?))
    }

    fn info(&self, image: &[u8]) -> ImageInfo {
        let virtual_size = le64(&image[EXTENT..], 16) * 512;
        ImageInfo { virtual_size, cluster_size: SE_GRAIN as u64 }
    }

    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        sesparse_content(&image[EXTENT..], below.unwrap_or_default())
    }

    fn is_sound(&self, image: &[u8]) -> bool {
        delta_layout::sesparse_is_sound(image)
    }

    fn can_empty(&self) -> bool {
        false
    }

    fn has_sink(&self) -> bool {
        false
    }
}

impl Builder for SeSparseKit {
    fn cluster(&self) -> u64 {
        SE_GRAIN as u64
    }

    fn build(&self, layer: &Layer) -> Vec<u8> {
        let held = |(grain, held): (u64, Held)| match held {
            Held::Zero if grain % 2 == 0 => (grain as usize, SeHeld::Unmapped),
            Held::Zero => (grain as usize, SeHeld::Zero),
            _ => (grain as usize, SeHeld::Data(layer.bytes(grain))),
        };
        let size = layer.size as usize;
        let extent = sesparse(size, &layer.clusters().map(held).collect::<Vec<_>>());
        pack(("seSparse", "SESPARSE"), ANY_IDS, size, &extent)
    }
}

impl FormatKit for CowdKit {
    fn layout(&self, image: &[u8]) -> Layout {
        delta_layout::cowd(image)
    }

    fn salvage(&self, image: &[u8]) -> Option<Disk> {
        delta_salvage::cowd(image)
    }

    fn records_parent(&self) -> bool {
        true
    }

    fn chains(&self) -> Vec<Chain> {
        delta_chains::cowd_chains()
    }

    fn drawn(&self, random: &mut Random, place: Place) -> Option<Vec<u8>> {
        Some(delta_chains::cowd_drawn(random, place))
    }

    fn parts(&self, size: usize) -> Parts {
        delta_chains::cowd_parts(size)
    }
}

impl FormatKit for SeSparseKit {
    fn layout(&self, image: &[u8]) -> Layout {
        delta_layout::sesparse(image)
    }

    fn salvage(&self, image: &[u8]) -> Option<Disk> {
        delta_salvage::sesparse(image)
    }

    fn records_parent(&self) -> bool {
        true
    }

    fn drawn(&self, random: &mut Random, place: Place) -> Option<Vec<u8>> {
        Some(delta_chains::sesparse_drawn(random, place))
    }

    fn parts(&self, size: usize) -> Parts {
        delta_chains::sesparse_parts(size)
    }
}
