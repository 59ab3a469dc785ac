//! Valid chains of every kind, for those who commit and damage them.

use crate::{build, Spec, State, CLUSTER};
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::units;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

fn data(clusters: &[usize], seed: u8) -> Vec<(usize, State)> {
    clusters.iter().map(|&cluster| (cluster, State::Data(seed))).collect()
}

fn packed(clusters: &[usize], seed: u8) -> Vec<(usize, State)> {
    clusters.iter().map(|&cluster| (cluster, State::Packed(seed))).collect()
}

/// qcow into qcow.
pub fn chains() -> Vec<Chain> {
    let size = 200 * CLUSTER - 512;
    let top = Spec::new(size, b"base").with(data(&[0, 1, 5, 130, 199], 0x21)).with(packed(&[3, 7, 8, 131], 0x23));
    let base = Spec::new(size, b"root").with(data(&[0, 3, 40], 0x43)).with(packed(&[1, 2, 199], 0x45));
    let root = Spec::new(size, b"").with(data(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 130, 199], 0x66));
    let tail = Spec { tail: 3 * CLUSTER + 100, ..base.clone() };
    let sectors = Spec { cluster_bits: 9, l2_bits: 7, ..top.clone() };
    let single = Spec { name: Vec::new(), ..base.clone() };
    let longer = Spec { size: size + 70 * CLUSTER, ..top.clone() };
    let same_table = Spec { size: size - 20 * CLUSTER, ..single.clone() };
    let same_table = Spec { clusters: data(&[0, 3, 40], 0x43), ..same_table };
    let pairs = [
        (&top, &base, Some(&root)),
        (&top, &tail, Some(&root)),
        (&sectors, &base, Some(&root)),
        (&top, &single, None),
        (&longer, &single, None),
        (&longer, &same_table, None),
    ];
    let chain = |(top, base, root): &(&Spec, &Spec, Option<&Spec>)| {
        let mut chain = vec![(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base))];
        chain.extend(root.map(|root| (ANCESTOR, build(root))));
        chain
    };
    let mut chains: Vec<Chain> = pairs.iter().map(chain).collect();
    // Two layers at once.
    let middle = Spec::new(size, b"base").with(data(&[1, 2, 6, 199], 0x31)).with(packed(&[130, 9], 0x33));
    chains.push(vec![
        (OVERLAY, build(&top)),
        (MIDDLE, build(&middle)),
        (DEVICE_OUTPUT, build(&base)),
        (ANCESTOR, build(&root)),
    ]);
    chains
}

/// Images with plain and compressed clusters, in each role.
pub fn parts(size: usize) -> Parts {
    let overlay = Spec::new(size, b"base").with(data(&[0, 3], 0x21)).with(packed(&[1, 4], 0x23));
    let middle = Spec::new(size, b"base").with(data(&[1], 0x31)).with(packed(&[2], 0x33));
    let backing = Spec::new(size, b"").with(data(&[0], 0x43)).with(packed(&[1, 2], 0x45));
    Parts {
        overlays: vec![build(&overlay)],
        middle: Some(build(&middle)),
        backings: vec![build(&backing), build(&Spec { tail: 700, ..backing.clone() })],
    }
}

/// Plain and compressed clusters of several sizes, in tables of several.
pub fn drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let name: &[u8] = if place.has_parent { b"below" } else { b"" };
    let (cluster_bits, l2_bits) = (*random.pick(&[9, 10, 12]), *random.pick(&[6, 7, 9]));
    let packed = random.byte();
    let state = |seed: u8| if seed % 4 == packed % 4 { State::Packed(seed) } else { State::Data(seed) };
    let held = units(random, place.size >> cluster_bits).into_iter().map(|(cluster, seed)| (cluster, state(seed)));
    let spec = Spec { cluster_bits, l2_bits, tail: random.index(2) * 700, ..Spec::new(place.size, name) };
    build(&spec.with(held))
}
