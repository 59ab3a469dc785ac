//! Valid chains of every kind, for those who commit and damage them.

use crate::{build, Spec, State, BLOCK};
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::units;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

/// VDI into VDI.
pub fn chains() -> Vec<Chain> {
    let size = 200 * BLOCK - 512;
    let data = |blocks: &[usize], seed| blocks.iter().map(|&b| (b, State::Data(seed))).collect::<Vec<_>>();
    let top = Spec::new(size, 3, 2).with(data(&[0, 1, 5, 130, 199], 0x21)).with([(7, State::Zero), (3, State::Zero)]);
    let base = Spec::new(size, 2, 1).with(data(&[0, 3, 40], 0x43)).with([(2, State::Zero)]);
    let root = Spec::new(size, 1, 0).with(data(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 130, 199], 0x66));
    let gaps = Spec { gaps: vec![1, 3], room: 512, entries: 210, ..base.clone() };
    let longer = Spec { size: size + 70 * BLOCK, room: 0, entries: 270, ..top.clone() };
    let fixed = Spec { parent: 0, ..base.clone() }.preallocated();
    let pairs = [
        (top.clone(), base.clone(), Some(&root)),
        (top.clone(), gaps.clone(), Some(&root)),
        (top.clone(), fixed, None),
        (longer.clone(), base.clone(), Some(&root)),
        (longer, gaps, Some(&root)),
    ];
    let chain = |(top, base, root): &(Spec, Spec, Option<&Spec>)| {
        let mut chain = vec![(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base))];
        chain.extend(root.map(|root| (ANCESTOR, build(root))));
        chain
    };
    let mut chains: Vec<Chain> = pairs.iter().map(chain).collect();
    // Two layers at once: the lower one's record of its parent follows.
    let top = Spec { number: 4, parent: 3, ..top };
    let middle = Spec::new(size, 3, 2).with(data(&[1, 2, 6, 199], 0x31));
    chains.push(vec![
        (OVERLAY, build(&top)),
        (MIDDLE, build(&middle)),
        (DEVICE_OUTPUT, build(&base)),
        (ANCESTOR, build(&root)),
    ]);
    chains
}

/// Backings that are dynamic and static; a layer above each of them.
pub fn parts(size: usize) -> Parts {
    let backing = Spec::new(size, 2, 0).with([(0, State::Data(0x43)), (21, State::Zero)]);
    let fixed = Spec::new(size, 2, 0).with([(0, State::Data(0x43))]).preallocated();
    let middle = Spec::new(size, 3, 2).with([(1, State::Data(0x31)), (2, State::Zero)]);
    Parts {
        overlays: Vec::new(),
        middle: Some(build(&middle)),
        backings: vec![build(&backing), build(&Spec { gaps: vec![0], ..backing.clone() }), build(&fixed)],
    }
}

/// An image over a parent or without one, then dynamic or static.
pub fn drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let zero = random.byte();
    let state = |seed: u8| if seed % 4 == zero % 4 { State::Zero } else { State::Data(seed) };
    let blocks = units(random, place.size / BLOCK).into_iter().map(|(block, seed)| (block, state(seed)));
    let spec = Spec::new(place.size, place.number, place.parent(0)).with(blocks);
    if !place.has_parent && random.index(4) == 0 {
        return build(&spec.preallocated());
    }
    let more = random.index(200);
    let gaps = (0..random.index(3)).map(|_| random.index(spec.blocks.len().max(1))).collect();
    build(&Spec { gaps, room: spec.room + more, entries: spec.entries + more / 2, ..spec })
}
