//! Valid chains of every kind, for those who commit and damage them.

use crate::spec::{build, Kind, Linkage, Log, Spec};
use crate::MIB;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::runs;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

/// VHDX into VHDX.
pub fn chains() -> Vec<Chain> {
    let size = 3 * MIB - 4096;
    let spec = |kind, id: u8, parent: u8| Spec { id, parent: [parent; 16], ..Spec::new(kind, size) };
    let top = spec(Kind::Differencing, 7, 5).with([(0, 3, 0x21), (30, 20, 0x22), (2000, 200, 0x23), (6135, 1, 0x24)]);
    let base = spec(Kind::Differencing, 5, 4).with([(1, 1, 0x43), (16, 16, 0x44), (4096, 2040, 0x45)]);
    let root = spec(Kind::Dynamic, 4, 0).with([(0, 64, 0x66), (2048, 2048, 0x67)]);
    let dynamic = Spec { id: 5, ..root.clone() };
    let pending = |spec: &Spec| Spec { log: Log::Pending, ..spec.clone() };
    let pairs = [
        (top.clone(), base.clone()),
        (pending(&top), pending(&base)),
        (
            Spec { linkage: Linkage::Alone, hollow: vec![1], ..top.clone() },
            Spec { by_bitmap: true, garbage: 0x99, ..base.clone() },
        ),
        (Spec { linkage: Linkage::Torn, table_last: true, ..top.clone() }, Spec { gap: 1, tail: 1, ..base.clone() }),
        (Spec { states: vec![(1, 2)], ..top.clone() }, Spec { states: vec![(1, 3 | 1 << 20), (0, 2)], ..base.clone() }),
    ];
    let mut chains: Vec<Chain> = pairs
        .iter()
        .map(|(top, base)| vec![(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base)), (ANCESTOR, build(&root))])
        .collect();
    for base in [dynamic.clone(), Spec { kind: Kind::Fixed, ..dynamic }] {
        chains.push(vec![(OVERLAY, build(&top)), (DEVICE_OUTPUT, build(&base))]);
    }
    // Two layers at once.
    let (top, middle) = (Spec { parent: [6; 16], ..top.clone() }, spec(Kind::Differencing, 6, 5).with([(1, 40, 0x31)]));
    chains.push(vec![
        (OVERLAY, build(&top)),
        (MIDDLE, build(&middle)),
        (DEVICE_OUTPUT, build(&base)),
        (ANCESTOR, build(&root)),
    ]);
    chains
}

/// Backings of all kinds, and a layer above them.
pub fn parts(size: usize) -> Parts {
    let spec = |kind| Spec::new(kind, size / 512 * 512);
    let backing = |kind, log| build(&Spec { log, ..spec(kind) }.with([(0, 2, 0x43), (21, 3, 0x44)]));
    let middle = Spec { id: 6, parent: [5; 16], ..spec(Kind::Differencing) }.with([(1, 5, 0x31)]);
    Parts {
        overlays: Vec::new(),
        middle: Some(build(&middle)),
        backings: vec![
            backing(Kind::Dynamic, Log::Empty),
            backing(Kind::Dynamic, Log::Pending),
            backing(Kind::Fixed, Log::Empty),
        ],
    }
}

/// An image with blocks of 1 or 2 MiB and sectors of either size, over a parent or without one.
pub fn drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let kind = match (place.has_parent, random.index(4)) {
        (true, _) => Kind::Differencing,
        (false, 0) => Kind::Fixed,
        (false, _) => Kind::Dynamic,
    };
    let mut spec = Spec {
        sector: place.sector,
        block: MIB << random.index(2),
        id: place.number,
        parent: [place.parent(0); 16],
        by_bitmap: random.coin(),
        log: *random.pick(&[Log::Empty, Log::Empty, Log::Stale, Log::Pending]),
        linkage: *random.pick(&[Linkage::Second, Linkage::Second, Linkage::Alone, Linkage::Torn]),
        table_last: random.coin(),
        gap: random.index(2),
        tail: random.index(2),
        both: random.index(4) != 0,
        garbage: *random.pick(&[0, 0x99]),
        runs: runs(random, place.size / place.sector),
        ..Spec::new(kind, place.size)
    };
    for block in (0..place.size.div_ceil(spec.block)).filter(|_| kind != Kind::Fixed) {
        match random.index(8) {
            0 => spec.states.push((block, random.below(4))),
            1 => spec.hollow.push(block),
            _ => {}
        }
    }
    build(&spec)
}
