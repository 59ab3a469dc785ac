//! Several layers as one source, against a model: what is seen of each sector.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::ImageInfo;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, ReadBelow, Source};
use instar_guest_view::{Ancestors, Layers, Opener};
use proptest::prelude::*;
use std::ops::Range;

const SECTOR: u64 = 512;

/// What a layer holds of a sector.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Held {
    Nothing,
    Data,
    Zero,
    Encoded,
}

/// A layer whose data says where it comes from: sector `n` stands at sector `n + 7` of device `device`.
struct Layer {
    device: u32,
    sectors: Vec<Held>,
    cluster_size: u64,
}

impl Source for Layer {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.sectors.len() as u64 * SECTOR, cluster_size: self.cluster_size }
    }

    fn verify(&mut self, _: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        assert!(!will_empty);
        Ok(0)
    }

    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        assert_eq!(range.start % SECTOR, 0);
        assert!(range.start < range.end && range.end <= self.info().virtual_size);
        let mut at = (range.start / SECTOR) as usize;
        while (at as u64) * SECTOR < range.end && !out.is_full() {
            let held = self.sectors[at];
            let run = self.sectors[at..].iter().take_while(|&&other| other == held).count();
            // Encoded ones are no longer than a cluster.
            let run = if held == Held::Encoded { run.min(3) } else { run };
            let start = at as u64 * SECTOR;
            let length = run as u64 * SECTOR;
            let extent = match held {
                Held::Nothing => None,
                Held::Data => Some(Extent::data(start, length, self.device, start + 7 * SECTOR)),
                Held::Zero => Some(Extent::zero(start, length)),
                Held::Encoded => Some(Extent::encoded(start, length, (1 << 60) | start)),
            };
            assert!(extent.is_none_or(|extent| out.push(extent)));
            at += run;
        }
        Ok(at as u64 * SECTOR)
    }

    fn read(&mut self, _: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        assert_eq!(extent.content, Content::Encoded { location: (1 << 60) | extent.guest_offset });
        assert!(from >= extent.guest_offset && from + buffer.len() as u64 <= extent.guest_offset + extent.length);
        for (index, byte) in (0..).zip(buffer.iter_mut()) {
            *byte = encoded(self.device, (from + index) / SECTOR);
        }
        Ok(())
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        unreachable!("several layers are not emptied")
    }
}

/// The bytes of an encoded sector.
fn encoded(device: u32, sector: u64) -> u8 {
    (sector as u8 & 63) | (device as u8) << 6
}

/// What is seen of a sector: nothing, zeroes, or data of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    Nothing,
    Zero,
    Data(u32),
    Encoded(u32),
}

fn expected(layers: &[Vec<Held>]) -> Vec<Seen> {
    let seen = |sector: usize| {
        for (device, layer) in (0..).zip(layers) {
            match layer.get(sector) {
                None | Some(Held::Zero) => return Seen::Zero,
                Some(Held::Data) => return Seen::Data(device),
                Some(Held::Encoded) => return Seen::Encoded(device),
                Some(Held::Nothing) => {}
            }
        }
        Seen::Nothing
    };
    (0..layers[0].len()).map(seen).collect()
}

fn open(layers: &[Vec<Held>]) -> Layers<'static> {
    open_in_clusters(layers, SECTOR)
}

fn open_in_clusters(layers: &[Vec<Held>], cluster_size: u64) -> Layers<'static> {
    let open = |(device, sectors): (u32, &Vec<Held>)| -> Box<dyn Source> {
        Box::new(Layer { device, sectors: sectors.clone(), cluster_size })
    };
    Layers::new((0..).zip(layers).map(open).collect())
}

/// Enumerate everything from byte `from` on, `max` extents at once, and read what has to be decoded.
fn enumerate(source: &mut Layers<'_>, from: u64, max: usize) -> Vec<Seen> {
    let mut io = MemoryDevices::default();
    let size = source.info().virtual_size;
    let mut found = vec![Seen::Nothing; (size / SECTOR) as usize];
    let (mut at, mut last) = (from, from);
    while at < size {
        let mut extents = Extents::with_room_for(max);
        let next = source.extents(&mut io, at..size, &mut extents).unwrap();
        assert!(next > at);
        for extent in extents.iter() {
            assert!(extent.length > 0 && extent.guest_offset >= last);
            last = extent.guest_offset + extent.length;
            assert!(last <= next);
            for sector in extent.guest_offset / SECTOR..last / SECTOR {
                found[sector as usize] = match extent.content {
                    Content::Zero => Seen::Zero,
                    Content::Data { device, offset } => {
                        assert_eq!(offset + sector * SECTOR - extent.guest_offset, (sector + 7) * SECTOR);
                        Seen::Data(device)
                    }
                    _ => {
                        let mut byte = [0];
                        source.read(&mut io, extent, sector * SECTOR + 5, &mut byte).unwrap();
                        assert_eq!(u64::from(byte[0]) & 63, sector & 63);
                        Seen::Encoded(u32::from(byte[0] >> 6))
                    }
                };
            }
        }
        at = next;
    }
    found
}

fn layer() -> impl Strategy<Value = Vec<Held>> {
    let held = prop::sample::select(vec![Held::Nothing, Held::Nothing, Held::Data, Held::Zero, Held::Encoded]);
    prop::collection::vec((held, 1..9usize), 1..16)
        .prop_map(|runs| runs.into_iter().flat_map(|(held, count)| vec![held; count]).collect())
}

/// A VHD holds its blocks by sectors: more extents of one than a layer is asked for at once.
#[test]
fn a_cluster_of_very_many_extents_is_passed() {
    let top = [vec![Held::Data; 3000], vec![Held::Nothing; 1096]].concat();
    let middle: Vec<Held> = (0..4096).map(|at| if at % 2 == 0 { Held::Data } else { Held::Nothing }).collect();
    let layers = [top, middle, vec![Held::Data; 4096]];
    assert_eq!(enumerate(&mut open_in_clusters(&layers, 4096 * SECTOR), 0, 100), expected(&layers));
}

proptest! {
    #[test]
    fn the_top_most_wins(
        layers in prop::collection::vec(layer(), 1..5),
        max in 1..6usize,
        again in any::<prop::sample::Index>(),
    ) {
        let expected = expected(&layers);
        let mut source = open(&layers);
        let mut io = MemoryDevices::default();
        let held = expected.iter().filter(|&&seen| seen != Seen::Nothing).count();
        prop_assert_eq!(source.verify(&mut io, false).unwrap(), held as u64);
        prop_assert_eq!(&enumerate(&mut source, 0, max), &expected);
        // It can begin anywhere, also before where it was.
        let from = again.index(expected.len());
        let found = enumerate(&mut source, from as u64 * SECTOR, 1000);
        prop_assert_eq!(&found[from..], &expected[from..]);
        prop_assert_eq!(&enumerate(&mut source, 0, 1000), &expected);
        prop_assert!(source.empty(&mut io).is_err() && source.verify(&mut io, true).is_err());
    }
}

#[test]
fn an_ancestor_is_opened_only_when_something_is_read_from_it() {
    use std::cell::Cell;
    let opened = Cell::new([0; 3]);
    let layer = |index: usize, held: Held| -> (u64, Opener<'_>) {
        let opened = &opened;
        let open = move || -> DriverResult<Box<dyn Source>> {
            let mut counts = opened.get();
            counts[index] += 1;
            opened.set(counts);
            Ok(Box::new(Layer { device: index as u32, sectors: vec![held, Held::Nothing], cluster_size: SECTOR }))
        };
        (2 * SECTOR, Box::new(open))
    };
    let mut below = Ancestors::when_needed([layer(0, Held::Nothing), layer(1, Held::Data), layer(2, Held::Data)]);
    assert_eq!((below.exists(), below.length(), opened.get()), (true, 2 * SECTOR, [0; 3]));
    let mut io = MemoryDevices::new([(1, vec![5; 16 * SECTOR as usize])]);
    let mut buffer = vec![0; SECTOR as usize];
    for _ in 0..2 {
        below.read(&mut io, 0, &mut buffer).unwrap();
        assert!(buffer.iter().all(|&byte| byte == 5));
        assert_eq!(opened.get(), [1, 1, 0], "each once, and the lowest never");
    }
}
