//! Valid chains of every kind, for those who commit and damage them.

use crate::{build, Kind, Spec, SECTOR};
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::runs;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

const BLOCK: usize = 8192;

/// vpc into vpc.
pub fn chains() -> Vec<Chain> {
    let size = 40 * BLOCK;
    let spec = |kind, id, parent| Spec { id, parent, ..Spec::new(kind, size, BLOCK) };
    let top = spec(Kind::Differencing, 7, 5).with([(0, 3, 0x21), (30, 20, 0x22), (200, 16, 0x23), (639, 1, 0x24)]);
    let base = spec(Kind::Differencing, 5, 4).with([(1, 1, 0x43), (16, 16, 0x44), (300, 40, 0x45)]);
    let root = spec(Kind::Dynamic, 4, 0).with([(0, 64, 0x66), (310, 5, 0x67)]);
    let dynamic = Spec { id: 5, ..root.clone() };
    let pairs = [
        (top.clone(), base.clone()),
        (Spec { batmap: true, ..top.clone() }, Spec { batmap: true, block: 4096, ..base.clone() }),
        (
            Spec { hollow: vec![9, 10], tail: false, ..top.clone() },
            Spec { table_last: true, garbage: 0x99, ..base.clone() },
        ),
        (Spec { block: 65536, gap: 2, ..top.clone() }, Spec { tail: false, spare: 100, ..base.clone() }),
    ];
    let mut chains: Vec<Chain> = pairs
        .iter()
        .map(|(top, base)| vec![(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base)), (ANCESTOR, build(&root))])
        .collect();
    for base in [dynamic.clone(), Spec { batmap: true, ..dynamic.clone() }, Spec { kind: Kind::Fixed, ..dynamic }] {
        chains.push(vec![(OVERLAY, build(&top)), (DEVICE_OUTPUT, build(&base))]);
    }
    // Two layers at once.
    let (top, base) = &pairs[0];
    let (top, middle) = (Spec { parent: 6, ..top.clone() }, spec(Kind::Differencing, 6, 5).with([(1, 40, 0x31)]));
    chains.push(vec![
        (OVERLAY, build(&top)),
        (MIDDLE, build(&middle)),
        (DEVICE_OUTPUT, build(base)),
        (ANCESTOR, build(&root)),
    ]);
    chains
}

/// Backings of all kinds. No layer goes above one of another format: it says which VHD its parent is.
pub fn parts(size: usize) -> Parts {
    let spec = |kind| Spec::new(kind, size / SECTOR * SECTOR, BLOCK);
    let backing = |kind, batmap| build(&Spec { batmap, ..spec(kind) }.with([(0, 2, 0x43), (21, 3, 0x44)]));
    Parts {
        overlays: Vec::new(),
        middle: None,
        backings: vec![backing(Kind::Dynamic, false), backing(Kind::Dynamic, true), backing(Kind::Fixed, false)],
    }
}

/// An image with blocks of 4 to 64 KiB, over a parent or without one.
pub fn drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let kind = match (place.has_parent, random.index(4)) {
        (true, _) => Kind::Differencing,
        (false, 0) => Kind::Fixed,
        (false, _) => Kind::Dynamic,
    };
    let block = 4096 << random.index(5);
    let blocks = place.size / block;
    build(&Spec {
        id: place.number,
        parent: place.parent(0),
        batmap: random.coin(),
        spare: *random.pick(&[0, 100]),
        table_last: random.coin(),
        gap: random.index(3),
        tail: random.index(4) != 0,
        garbage: *random.pick(&[0, 0x99]),
        hollow: (0..random.index(3)).map(|_| random.index(blocks)).collect(),
        runs: runs(random, place.size / SECTOR),
        ..Spec::new(kind, place.size, block)
    })
}
