//! The format, as tests know it that know no format.

use crate::{be64, chains, device, layout, salvage, spec, Spec, View, CLUSTER};
use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{Builder, Held, Layer, ParentKit, Recorded};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Parent, Sink, Source};
use instar_qcow_driver::Qcow;
use instar_testkit::{sink_of, source_of, Chain, Disk, FormatKit, ImageKit, Layout, Parts, Place, OVERLAY};

/// qcow version 1.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Qcow>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Qcow>(io, device, has_backing)
    }

    fn info(&self, bytes: &[u8]) -> ImageInfo {
        let DeviceConfig { virtual_size, cluster_size, .. } = device(OVERLAY, bytes, u64::MAX);
        ImageInfo { virtual_size, cluster_size }
    }

    fn is_sound(&self, bytes: &[u8]) -> bool {
        layout::is_sound(bytes)
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
        &[Held::Nothing, Held::Data, Held::Encoded]
    }

    fn build(&self, layer: &Layer) -> Vec<u8> {
        let name: &[u8] = if layer.has_backing { b"backing" } else { b"" };
        let spec = Spec::new(layer.size as usize, name);
        let content = |(number, held)| (number as usize, layer.bytes(number), held == Held::Encoded);
        spec::assemble(&spec, layer.clusters().map(content))
    }
}

impl ParentKit for Kit {
    fn recorded(&self, bytes: &[u8]) -> Option<Recorded> {
        let (at, length) = (be64(bytes, 8) as usize, (be64(bytes, 16) >> 32) as usize);
        (at != 0 && length != 0)
            .then(|| Recorded { names: vec![bytes[at..at + length].to_vec()], ..Recorded::default() })
    }

    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        Recorded { names: vec![parent.name.to_vec()], ..Recorded::default() }
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

    fn goes_over_any(&self) -> bool {
        true
    }

    fn parts(&self, size: usize) -> Parts {
        chains::parts(size)
    }
}
