//! The format, as tests know it that know no format.

use crate::{build, chains, layout, salvage, Kind, Spec, View, SECTOR};
use instar_guest_sdk::abi::{DeviceConfig, ImageId, ImageInfo};
use instar_guest_sdk::conformance::{Builder, Held, Layer, ParentKit, Recorded};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Parent, Sink, Source};
use instar_testkit::{sink_of, source_of, Chain, Disk, FormatKit, ImageKit, Layout, Parts, Place};
use instar_vhd_driver::Vhd;

/// vpc.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Vhd>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Vhd>(io, device, has_backing)
    }

    fn info(&self, bytes: &[u8]) -> ImageInfo {
        let view = View::new(bytes);
        ImageInfo { virtual_size: view.size as u64, cluster_size: view.block as u64 }
    }

    fn is_sound(&self, bytes: &[u8]) -> bool {
        layout::is_comparable(bytes) && View::new(bytes).fault().is_none()
    }

    /// The footer at the end is missing while a block is added: QEMU and blktap take its copy then.
    fn is_dirty(&self, bytes: &[u8]) -> bool {
        let view = View::new(bytes);
        view.fault().is_none() && (!view.is_whole() || view.batmap().is_some_and(|(_, _, valid)| !valid))
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
        let (id, names) = View::new(bytes).parent()?;
        let names = names.into_iter().map(String::into_bytes).collect();
        Some(Recorded { names, format: None, identity: ImageId::new(&id) })
    }

    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        let path = parent.name.strip_prefix(b"./").unwrap_or(parent.name);
        let base = path.rsplit(|&byte| byte == b'/').next().unwrap();
        Recorded { names: vec![base.to_vec(), path.to_vec()], format: None, identity: parent.identity }
    }
}

impl Builder for Kit {
    fn cluster(&self) -> u64 {
        4096
    }

    fn states(&self) -> &[Held] {
        &[Held::Nothing, Held::Data]
    }

    /// Blocks of one cluster to eight, with and without a batmap, a table behind the blocks, gaps, and whatever the seed says.
    fn build(&self, layer: &Layer) -> Vec<u8> {
        let kind = if layer.has_backing { Kind::Differencing } else { Kind::Dynamic };
        let seed = layer.seed as usize;
        let size = layer.size as usize;
        let spec = Spec {
            batmap: seed % 2 == 1,
            spare: [0, 0, 200][seed % 3],
            table_last: seed % 5 == 1,
            gap: [0, 0, 0, 3][seed % 4],
            tail: seed % 7 != 3,
            garbage: [0, 0x99][seed / 2 % 2],
            ..Spec::new(kind, size, 4096 << (seed % 4))
        };
        let per_cluster = layer.cluster as usize / SECTOR;
        let runs: Vec<_> = layer
            .clusters()
            .map(|(cluster, _)| {
                let first = cluster as usize * per_cluster;
                (first, per_cluster.min(size / SECTOR - first), 0)
            })
            .collect();
        let mut file = build(&spec.with(runs.clone()));
        // The bytes are the layer's.
        let view = View::new(&file);
        let places: Vec<(usize, usize)> = view.blocks().map(|(b, at)| (b, at + view.bitmap_bytes())).collect();
        let block = view.block;
        for (cluster, _) in layer.clusters() {
            for (index, bytes) in layer.bytes(cluster).chunks(SECTOR).enumerate() {
                let guest = cluster as usize * layer.cluster as usize + index * SECTOR;
                let place = places.iter().find(|(number, _)| *number == guest / block).unwrap();
                let at = place.1 + guest % block;
                file[at..at + SECTOR].copy_from_slice(bytes);
            }
        }
        file
    }
}

impl FormatKit for Kit {
    fn layout(&self, bytes: &[u8]) -> Layout {
        layout::layout(bytes)
    }

    fn salvage(&self, bytes: &[u8]) -> Option<Disk> {
        salvage::salvage(bytes)
    }

    fn seal(&self, bytes: &mut [u8]) {
        layout::seal_all(bytes);
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
