//! The format, as tests know it that know no format.

use crate::{build, chains, device, layout, salvage, Spec, View, BLOCK, MAP};
use instar_guest_sdk::abi::{DeviceConfig, ImageId, ImageInfo};
use instar_guest_sdk::conformance::{Builder, Held, Layer, ParentKit, Recorded};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Parent, Sink, Source};
use instar_testkit::{sink_of, source_of, Chain, Disk, FormatKit, ImageKit, Layout, Parts, Place, OVERLAY};
use instar_vdi_driver::Vdi;

/// VDI.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Vdi>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Vdi>(io, device, has_backing)
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
        BLOCK as u64
    }

    /// All have one identity: here nobody asks whether an image is the other's parent. Images with a backing have no room for
    /// a longer map.
    fn build(&self, layer: &Layer) -> Vec<u8> {
        let spec = Spec::new(layer.size as usize, 1, u8::from(layer.has_backing));
        let mut bytes = build(&Spec { room: if layer.has_backing { 0 } else { 128 }, ..spec });
        let (mut slot, data) = (0, crate::le32(&bytes, 344));
        for (block, held) in layer.clusters() {
            let at = MAP + block as usize * 4;
            if held == Held::Zero {
                crate::put32(&mut bytes, at, 0xffff_fffe);
                continue;
            }
            crate::put32(&mut bytes, at, slot);
            bytes.extend(layer.bytes(block));
            slot += 1;
            bytes.resize(data + slot * BLOCK, 0x99);
        }
        crate::put32(&mut bytes, 388, slot);
        bytes
    }
}

impl ParentKit for Kit {
    fn recorded(&self, bytes: &[u8]) -> Option<Recorded> {
        let view = View::new(bytes);
        let [create, modify] = view.parent();
        assert_eq!(create == [0; 16], crate::le32(bytes, 76) != 4, "type and link");
        (create != [0; 16] || modify != [0; 16] || view.announced())
            .then(|| Recorded { identity: ImageId::new(&[create, modify].concat()), ..Recorded::default() })
    }

    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        Recorded { identity: parent.identity, ..Recorded::default() }
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
