//! Valid chains of every kind, for those who commit and damage them.

use crate::{build, Spec, State, GRAIN};
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::units;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

/// vmdk into vmdk.
pub fn chains() -> Vec<Chain> {
    let size = 600 * GRAIN;
    let data = |grains: &[usize], seed| grains.iter().map(|&g| (g, State::Data(seed))).collect::<Vec<_>>();
    let top = Spec::new(size, 7, 5).with(data(&[0, 1, 5, 513, 599], 0x21)).with([(7, State::Zero)]);
    let base = Spec::new(size, 5, 4).with(data(&[0, 3, 40], 0x43)).with([(2, State::Zero)]);
    let root = Spec::new(size, 4, u32::MAX).with(data(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 513], 0x66));
    let streamed = Spec { compressed: true, redundant: false, ..top.clone() };
    let pairs = [
        (top.clone(), base.clone()),
        (top.clone(), Spec { lazy_tables: true, ..base.clone() }),
        (streamed.clone(), Spec { redundant: false, zeroed: false, grains: vec![], ..base.clone() }),
        (Spec { footer: true, ..streamed }, base),
    ];
    let chain =
        |top: &Spec, base: &Spec| vec![(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base)), (ANCESTOR, build(&root))];
    let mut chains: Vec<Chain> = pairs.iter().map(|(top, base)| chain(top, base)).collect();
    // Two layers at once: the lower one's record of its parent follows.
    let (top, base) = &pairs[0];
    let above = Spec { parent: 6, ..top.clone() };
    let middle = Spec::new(size, 6, 5).with(data(&[1, 2, 6, 599], 0x31));
    chains.push(vec![
        (OVERLAY, build(&above)),
        (MIDDLE, build(&middle)),
        (DEVICE_OUTPUT, build(base)),
        (ANCESTOR, build(&root)),
    ]);
    // Into compressed grains, which are not those of the overlay: they could not be rewritten.
    let packed = Spec { compressed: true, ..Spec::new(size, 5, 4) }.with(data(&[3, 40], 0x43)).with([(2, State::Zero)]);
    chains.push(chain(top, &packed));
    let packed = Spec { redundant: false, lazy_tables: true, footer: true, ..packed };
    chains.push(chain(&pairs[2].0, &packed));
    chains
}

/// Backings with all of their tables and without, in two copies, and one of compressed grains, with tables in one copy and a
/// footer; a layer above each of them.
pub fn parts(size: usize) -> Parts {
    let backing = |lazy_tables| {
        let spec = Spec { lazy_tables, ..Spec::new(size, 5, u32::MAX) };
        build(&spec.with([(0, State::Data(0x43)), (21, State::Zero)]))
    };
    let packed =
        Spec { compressed: true, redundant: false, lazy_tables: true, footer: true, ..Spec::new(size, 5, u32::MAX) };
    let middle = Spec::new(size, 6, 5).with([(1, State::Data(0x31)), (2, State::Zero)]);
    Parts {
        overlays: Vec::new(),
        middle: Some(build(&middle)),
        backings: vec![backing(false), backing(true), build(&packed)],
    }
}

/// An image over a parent or without one, of all kinds that the driver writes.
pub fn drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let parent = if place.has_parent { u32::from(place.number - 1) } else { u32::MAX };
    let zero = random.byte();
    let state = |seed: u8| if seed % 4 == zero % 4 { State::Zero } else { State::Data(seed) };
    let grains = units(random, place.size / GRAIN).into_iter().map(|(grain, seed)| (grain, state(seed)));
    let spec = Spec::new(place.size, u32::from(place.number), parent).with(grains);
    build(&Spec { redundant: random.coin(), lazy_tables: random.coin(), ..spec })
}
