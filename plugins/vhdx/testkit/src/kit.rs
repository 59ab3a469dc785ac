//! The format, as tests know it that know no format.

use crate::spec::{build, guid_text, Kind, Linkage, Log, Spec};
use crate::{chains, layout, salvage, View, MIB};
use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{Builder, Held, Layer, ParentKit, Recorded};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, Parent, Sink, Source};
use instar_testkit::{sink_of, source_of, Chain, Disk, FormatKit, ImageKit, Layout, Parts, Place};
use instar_vhdx_driver::Vhdx;
use instar_vhdx_format::Guid;

/// VHDX.
pub struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Vhdx>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Vhdx>(io, device, has_backing)
    }

    fn info(&self, bytes: &[u8]) -> ImageInfo {
        let view = View::new(bytes);
        ImageInfo { virtual_size: view.size as u64, cluster_size: view.block as u64 }
    }

    fn is_sound(&self, bytes: &[u8]) -> bool {
        View::read(bytes).is_ok_and(|view| view.fault().is_none())
    }

    /// One of the headers is torn: the other one counts.
    fn is_dirty(&self, bytes: &[u8]) -> bool {
        let view = View::new(bytes);
        view.fault().is_none() && !view.both
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
        let view = View::new(bytes);
        let paths = ["relative_path", "volume_path", "absolute_win32_path"].map(|key| view.value(key));
        let linkages = ["parent_linkage", "parent_linkage2"].map(|key| view.value(key));
        let names = paths.into_iter().chain(linkages).flatten().map(String::into_bytes).collect();
        view.locator.map(|_| Recorded { names, ..Recorded::default() })
    }

    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        let path = String::from_utf8_lossy(parent.name).replace('/', "\\");
        let path = if path.starts_with('\\') { path } else { format!(".\\{path}") };
        let id = parent.identity.map_or([0; 16], |id| id.as_bytes().try_into().unwrap());
        let names = [path, guid_text(id), guid_text([0; 16])].map(String::into_bytes).to_vec();
        Recorded { names, ..Recorded::default() }
    }
}

impl Builder for Kit {
    fn cluster(&self) -> u64 {
        8192
    }

    /// Sectors of either size, logs of all kinds, a table behind the blocks, gaps, and whatever the seed says. A block whose
    /// clusters are all zero takes no room. Without a parent a block is there or it is not, so clusters that are smaller make
    /// only images with one.
    fn build(&self, layer: &Layer) -> Vec<u8> {
        let (seed, size) = (layer.seed as usize, layer.size as usize);
        let sector = if size % 4096 == 0 && seed % 2 == 1 { 4096 } else { 512 };
        let mut spec = Spec {
            sector,
            by_bitmap: seed % 3 == 1,
            table_last: seed % 5 == 1,
            gap: usize::from(seed % 7 == 1),
            tail: usize::from(seed % 4 == 1),
            both: seed % 6 != 5,
            log: [Log::Empty, Log::Pending, Log::Stale, Log::Empty][seed / 2 % 4],
            linkage: [Linkage::Second, Linkage::Alone, Linkage::Torn][seed % 3],
            garbage: [0, 0x99][seed / 3 % 2],
            ..Spec::new(Kind::Differencing, size)
        };
        let cluster = layer.cluster as usize;
        let per_cluster = cluster / sector;
        for (number, _) in layer.clusters() {
            let first = number as usize * per_cluster;
            spec.runs.push((first, per_cluster.min(size / sector - first), 0));
        }
        let in_block = MIB / cluster;
        for (block, held) in layer.held.chunks(in_block).enumerate() {
            if held.iter().all(|held| *held == Held::Zero) {
                spec.states.push((block, [2, 1, 3][seed % 3]));
            }
        }
        let mut spec_clean = spec.clone();
        spec_clean.log = Log::Empty;
        let mut file = build(&spec);
        // The bytes are the layer's.
        let clean = build(&spec_clean);
        let view = View::new(&clean);
        let places: Vec<(usize, u64, usize)> = view.blocks().collect();
        for (number, held) in layer.clusters() {
            let guest = number as usize * cluster;
            let Some((block, _, at)) = places.iter().find(|(block, state, _)| *block == guest / MIB && *state >= 6)
            else {
                continue;
            };
            let mut bytes = layer.bytes(number);
            if held == Held::Zero {
                bytes.fill(0);
            }
            let to = at + guest - block * MIB;
            file[to..to + bytes.len()].copy_from_slice(&bytes);
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

    fn records_parent(&self) -> bool {
        true
    }

    fn differ_by_parent(&self, was: &[u8], is: &[u8]) -> bool {
        layout::differ_by_parent(was, is)
    }

    fn seal(&self, bytes: &mut [u8]) {
        layout::seal_all(bytes);
    }

    /// By the recorded GUID, by the one that the locator announces, or by the one that the header does, if that follows from it.
    fn goes_with(&self, bytes: &[u8], parent: &[u8]) -> bool {
        let (child, parent) = (View::new(bytes), View::new(parent).guid(1));
        let linkage = child.value("parent_linkage").unwrap();
        let second = child.value("parent_linkage2").filter(|text| *text != guid_text([0; 16]));
        let mut announced = second.filter(|text| *text != linkage);
        let mut known = Guid::parse(linkage.encode_utf16()).unwrap();
        for _ in 0..8 {
            known = known.next(&child.guid(1));
            announced = announced.or(Some(guid_text(child.guid(0))).filter(|_| known.0 == child.guid(0)));
        }
        let Some(announced) = announced else { return linkage == guid_text(parent) };
        announced == guid_text(parent) || announced == guid_text(Guid(parent).next(&child.guid(1)).0)
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
