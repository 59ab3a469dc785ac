//! The format, as tests know it that know no format.

use crate::{chains, device, layout, le32, salvage, spec, Spec, Variant, View, CLUSTER, OPEN};
use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{Builder, Held, Layer};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Sink, Source};
use instar_parallels_driver::Parallels;
use instar_testkit::{sink_of, source_of, Chain, Disk, FormatKit, ImageKit, Layout, Parts, Place, OVERLAY};

/// Parallels expandable images.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Parallels>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Parallels>(io, device, has_backing)
    }

    fn info(&self, bytes: &[u8]) -> ImageInfo {
        let DeviceConfig { virtual_size, cluster_size, .. } = device(OVERLAY, bytes, u64::MAX);
        ImageInfo { virtual_size, cluster_size }
    }

    fn is_sound(&self, bytes: &[u8]) -> bool {
        layout::is_sound(bytes)
    }

    /// One that was not closed is still consistent: its flag excuses only that a check reports it.
    fn is_dirty(&self, bytes: &[u8]) -> bool {
        le32(bytes, 44) == OPEN && layout::is_sound(bytes)
    }

    fn content(&self, bytes: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        View::new(bytes).content(below.unwrap_or_default())
    }

    fn can_grow(&self) -> bool {
        true
    }
}

impl Builder for Kit {
    fn cluster(&self) -> u64 {
        CLUSTER as u64
    }

    fn states(&self) -> &'static [Held] {
        &[Held::Nothing, Held::Data]
    }

    /// Images with a backing are of the newer variant.
    fn build(&self, layer: &Layer) -> Vec<u8> {
        let variant = if layer.has_backing { Variant::Clusters } else { Variant::Sectors };
        let spec = Spec { variant, ..Spec::new(layer.size as usize) };
        spec::assemble(&spec, layer.clusters().map(|(number, _)| (number as usize, layer.bytes(number))))
    }
}

impl FormatKit for Kit {
    fn layout(&self, bytes: &[u8]) -> Layout {
        layout::layout(bytes)
    }

    fn salvage(&self, bytes: &[u8]) -> Option<Disk> {
        salvage::salvage(bytes)
    }

    fn chains(&self) -> Vec<Chain> {
        chains::chains()
    }

    fn drawn(&self, random: &mut Random, place: Place) -> Option<Vec<u8>> {
        Some(chains::drawn(random, place))
    }

    /// They record nothing at all.
    fn goes_over_any(&self) -> bool {
        true
    }

    fn parts(&self, size: usize) -> Parts {
        chains::parts(size)
    }
}
