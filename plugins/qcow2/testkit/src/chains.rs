//! Valid chains of every kind, for those who commit and damage them.

use crate::bitmaps::{BitmapSpec, Bits, AUTO, IN_USE};
use crate::builder::{build, Spec, State};
use crate::damage;
use crate::pair::data;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::units;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

/// qcow2 into qcow2: cluster sizes, refcount widths, versions, snapshots, bitmaps, subclusters, compression, repairs, growth.
pub fn chains() -> Vec<Chain> {
    let mut chains = Vec::new();
    let extents = |spec: Spec| {
        spec.with(data([0, 1, 5, 40], 0x21)).with([
            (7, State::Zero),
            (8, State::ZeroAllocated(9)),
            (9, State::Deflated(3)),
        ])
    };
    for (bits, top, snapshots, order, version, extended) in [
        (9, 9, 0, 4, 3, false),
        (9, 10, 1, 3, 3, false),
        (12, 9, 0, 6, 3, false),
        (10, 10, 2, 4, 2, false),
        (14, 9, 1, 4, 3, true),
        (9, 12, 0, 5, 3, false),
    ] {
        let size = 96u64 << bits;
        let backing = Spec { snapshots, refcount_order: order, version, extended, free: 2, ..Spec::new(bits, size) };
        let backing = build(&backing.with(data([0, 3, 40], 0x43)).with([(2, State::Deflated(5))]));
        let ancestor = build(&Spec::new(bits, size).with(data(0..20, 0x66)));
        let overlay = build(&extents(Spec { snapshots: snapshots / 2, ..Spec::new(top, size) }));
        chains.push([(OVERLAY, overlay), (DEVICE_OUTPUT, backing), (ANCESTOR, ancestor)].to_vec());
    }
    // Subclusters on both sides.
    let mixed = [(3, State::Mixed(0x71, 0xff00, 0xff)), (4, State::MixedZero(0xf0f)), (5, State::Data(2))];
    let subclusters = Spec { extended: true, ..Spec::new(14, 40 << 14) };
    let under = subclusters.clone().with([(3, State::Mixed(0x17, 0xf, 0xf0)), (6, State::Deflated(4))]);
    chains.push([(OVERLAY, build(&subclusters.with(mixed))), (DEVICE_OUTPUT, build(&under))].to_vec());
    // Bitmaps, and growth.
    let bitmap = |flags, bits: &[Bits]| BitmapSpec::new(flags, 9, bits);
    let bitmaps = vec![
        bitmap(AUTO, &[Bits::None]),
        bitmap(AUTO, &[Bits::Bytes(0x81), Bits::None]),
        bitmap(AUTO | IN_USE, &[Bits::Bytes(0x18)]),
        bitmap(0, &[Bits::All]),
    ];
    for (size, snapshots) in [(300u64, 0), (90, 1)] {
        let spec = Spec { bitmaps: bitmaps.clone(), autoclear: 1, snapshots, ..Spec::new(9, size << 9) };
        let spec = spec.with(data([0, 3, 40], 0x43));
        chains.push([(OVERLAY, build(&extents(Spec::new(9, 300 << 9)))), (DEVICE_OUTPUT, build(&spec))].to_vec());
    }
    // Not closed cleanly, on one side each.
    for spoiled in [OVERLAY, DEVICE_OUTPUT] {
        let spec = Spec { snapshots: 1, leaks: 3, ..Spec::new(9, 96 << 9) };
        let mut images =
            [(OVERLAY, build(&extents(Spec::new(9, 96 << 9)))), (DEVICE_OUTPUT, build(&spec.with(data([0, 3], 7))))];
        images.iter_mut().filter(|(device, _)| *device == spoiled).for_each(|(_, bytes)| damage::spoil(bytes, 3));
        chains.push(images.to_vec());
    }
    // Two layers at once, the upper one longer; a refcount table that has to grow; blocks in front and a file that is cut.
    let middle = build(&Spec::new(9, 80 << 9).with(data([1, 2, 60], 0x55)));
    let backing = Spec { leaks: 4_000, refcount_order: 6, ..Spec::new(9, 96 << 9) }.with(data([0, 3], 0x43));
    let overlay = build(&extents(Spec::new(9, 96 << 9)));
    chains.push([(OVERLAY, overlay.clone()), (MIDDLE, middle), (DEVICE_OUTPUT, build(&backing))].to_vec());
    let cut = Spec { blocks_first: true, cut: true, ..Spec::new(9, 96 << 9) }.with(data([0, 3], 0x43));
    chains.push([(OVERLAY, overlay), (DEVICE_OUTPUT, build(&cut))].to_vec());
    // An overlay that ends within its last cluster, a refcount block: it gets that cluster back when it is emptied.
    let overlay = build(&extents(Spec { cut: true, ..Spec::new(12, 96 << 9) }));
    assert!(!overlay.len().is_multiple_of(4096));
    chains.push([(OVERLAY, overlay), (DEVICE_OUTPUT, build(&cut))].to_vec());
    chains
}

/// Overlays of several cluster sizes, also with subclusters.
pub fn parts(size: usize) -> Parts {
    let overlay = |bits, extended| {
        let spec = Spec { extended, ..Spec::new(bits, size as u64) };
        let states = [(0, State::Data(0x21)), (1, State::Zero), (3, State::Deflated(3))];
        build(&spec.with(states).with(if bits < 12 { data([20, 21], 0x13) } else { vec![] }))
    };
    Parts {
        overlays: vec![overlay(9, false), overlay(12, false), overlay(14, true)],
        middle: Some(overlay(10, false)),
        backings: Vec::new(),
    }
}

/// An image with clusters of 512 bytes to 16 KiB. A quarter of them end before the disk below: these are such as can grow to its
/// length. Of the others some are of version 2, and some have a snapshot.
pub fn drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let bits = 9 + random.below(6) as u32;
    let (size, version, snapshots) = match random.index(4) {
        0 => (place.size / 4 * 3, 3, 0),
        1 => (place.size, 2, random.index(2)),
        _ => (place.size, 3, random.index(2)),
    };
    let zero = random.byte();
    let state = |seed: u8| match seed.wrapping_sub(zero) % 8 {
        0 if version == 3 => State::Zero,
        1 if version == 3 => State::ZeroAllocated(seed),
        // More noise than this does not shrink.
        2 => State::Deflated(seed % 160),
        _ => State::Data(seed),
    };
    let clusters = units(random, size >> bits).into_iter().map(|(cluster, seed)| (cluster as u64, state(seed)));
    let extended = bits == 14 && version == 3;
    let refcount_order = if version == 3 { 3 + random.below(4) as u32 } else { 4 };
    let (leaks, free) = (random.below(4), random.below(3));
    let (table_clusters, spec) = (8, Spec::new(bits, size as u64));
    let spec = Spec { version, extended, snapshots, refcount_order, leaks, free, table_clusters, ..spec };
    build(&spec.with(clusters))
}
