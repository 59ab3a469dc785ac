//! The format, as tests know it that know no format.

use crate::descriptor::{expected, recorded};
use crate::{chains, device, layout, salvage, View};
use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{ParentKit, Recorded};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Parent, Sink, Source};
use instar_testkit::{sink_of, source_of, Chain, Disk, FormatKit, ImageKit, Layout, Parts, Place, OVERLAY};
use instar_vmdk_driver::Vmdk;

/// vmdk.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Vmdk>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Vmdk>(io, device, has_backing)
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

impl ParentKit for Kit {
    fn recorded(&self, bytes: &[u8]) -> Option<Recorded> {
        recorded(&View::new(bytes).text())
    }

    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        expected(parent)
    }
}

impl FormatKit for Kit {
    fn layout(&self, bytes: &[u8]) -> Layout {
        layout::layout(bytes)
    }

    fn salvage(&self, bytes: &[u8]) -> Option<Disk> {
        salvage::salvage(bytes)
    }

    fn records_parent(&self) -> bool {
        true
    }

    fn goes_with(&self, bytes: &[u8], parent: &[u8]) -> bool {
        View::new(bytes).goes_with(&View::new(parent))
    }

    fn chains(&self) -> Vec<Chain> {
        chains::chains()
    }

    fn drawn(&self, random: &mut Random, place: Place) -> Option<Vec<u8>> {
        Some(chains::drawn(random, place))
    }

    fn parts(&self, size: usize) -> Parts {
        chains::parts(size)
    }
}
