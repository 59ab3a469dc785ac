//! The format, as tests know it that know no format.

use crate::{be32, be64, chains, checker, header, layout, pair, salvage};
use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{ParentKit, Recorded};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Parent, Sink, Source};
use instar_qcow2_driver::Qcow2;
use instar_testkit::{sink_of, source_of, Chain, Disk, FormatKit, ImageKit, Layout, Parts, Place};

/// qcow2.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Qcow2>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Qcow2>(io, device, has_backing)
    }

    fn info(&self, bytes: &[u8]) -> ImageInfo {
        ImageInfo { virtual_size: be64(bytes, 24), cluster_size: 1 << be32(bytes, 20) }
    }

    fn is_sound(&self, bytes: &[u8]) -> bool {
        layout::is_sound(bytes)
    }

    fn content(&self, bytes: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        checker::content(bytes, below)
    }

    fn snapshots(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        checker::snapshot_contents(bytes, None)
    }

    fn is_dirty(&self, bytes: &[u8]) -> bool {
        pair::is_dirty(bytes)
    }

    fn can_grow(&self) -> bool {
        true
    }
}

impl ParentKit for Kit {
    fn recorded(&self, bytes: &[u8]) -> Option<Recorded> {
        let format = header::extensions(bytes).into_iter().find(|(kind, ..)| *kind == header::BACKING_FORMAT);
        let name = header::backing_name(bytes);
        // One without the other is half a record.
        (name.is_some() || format.is_some()).then(|| Recorded {
            names: name.into_iter().collect(),
            format: format.map(|(_, _, name)| name),
            identity: None,
        })
    }

    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        Recorded { names: vec![parent.name.to_vec()], format: Some(parent.format.as_bytes().to_vec()), identity: None }
    }
}

impl FormatKit for Kit {
    fn layout(&self, bytes: &[u8]) -> Layout {
        layout::layout(bytes)
    }

    fn salvage(&self, bytes: &[u8]) -> Option<Disk> {
        salvage::salvage(bytes)
    }

    fn salvage_snapshots(&self, bytes: &[u8]) -> Vec<Option<Disk>> {
        salvage::salvage_snapshots(bytes)
    }

    fn checks_everything(&self) -> bool {
        true
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
