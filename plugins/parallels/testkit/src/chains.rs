//! Valid chains of every kind, for those who commit and damage them.

use crate::{build, section, Spec, CLOSED, CLUSTER, OPEN};
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::units;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

fn data(clusters: &[usize], seed: u8) -> Vec<(usize, u8)> {
    clusters.iter().map(|&cluster| (cluster, seed)).collect()
}

/// Parallels into Parallels.
pub fn chains() -> Vec<Chain> {
    let size = 200 * CLUSTER - 512;
    let top = Spec::new(size).newer().with(data(&[0, 1, 5, 130, 199], 0x21));
    let base = Spec::new(size).with(data(&[0, 3, 40], 0x43));
    let root = Spec::new(size).newer().with(data(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 130, 199], 0x66));
    let newer = Spec { tail: 3 * CLUSTER + 100, gaps: vec![1], ..base.clone().newer() };
    let odd = Spec::new(size).of_tracks(3).with(data(&[0, 2, 7, 131], 0x23));
    let double = Spec::new(size).of_tracks(6).newer().with(data(&[0, 2, 7, 65], 0x24));
    let bitmap = Spec { sections: Some(vec![section(0x2038_5fae_252c_b34a, 0, &[0; 32])]), ..top.clone() };
    // A longer one does not go with a parent that may be a snapshot.
    let shorter = Spec::new(150 * CLUSTER).newer().with(data(&[3, 40, 149], 0x25));
    let pairs = [
        (&top, &base, Some(&root)),
        (&top, &newer, Some(&root)),
        (&double, &base, Some(&root)),
        (&double, &odd, None),
        (&bitmap, &newer, None),
        (&shorter, &base, None),
        (&shorter, &newer, None),
    ];
    let chain = |(top, base, root): &(&Spec, &Spec, Option<&Spec>)| {
        let mut chain = vec![(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base))];
        chain.extend(root.map(|root| (ANCESTOR, build(root))));
        chain
    };
    let mut chains: Vec<Chain> = pairs.iter().map(chain).collect();
    // Two layers at once.
    let middle = Spec::new(size).newer().with(data(&[1, 2, 6, 199], 0x31));
    chains.push(vec![
        (OVERLAY, build(&top)),
        (MIDDLE, build(&middle)),
        (DEVICE_OUTPUT, build(&base)),
        (ANCESTOR, build(&root)),
    ]);
    chains
}

/// Images of both variants, in each role.
pub fn parts(size: usize) -> Parts {
    let overlay = Spec::new(size).newer().with(data(&[0, 3], 0x21));
    let middle = Spec::new(size).with(data(&[1], 0x31));
    let backing = Spec::new(size).with(data(&[0, 2], 0x43));
    Parts {
        overlays: vec![build(&overlay)],
        middle: Some(build(&middle)),
        backings: vec![build(&backing), build(&Spec { tail: 700, ..backing.clone().newer() })],
    }
}

/// An image of either variant, closed or not. All images of a chain have clusters of one size, as Parallels has it.
pub fn drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let tracks = if place.size > 512 << 10 { 3 } else { 2 };
    let spec = Spec::new(place.size).of_tracks(tracks);
    let held = units(random, place.size / (tracks * 512));
    let spec = if random.index(2) == 0 { spec.newer() } else { Spec { says_where: random.index(2) == 0, ..spec } };
    let gaps = (0..random.index(3)).map(|_| random.index(held.len().max(1))).collect();
    let in_use = *random.pick(&[0, CLOSED, CLOSED, OPEN]);
    let more = random.index(200);
    build(&Spec { gaps, in_use, room: random.index(9), entries: spec.entries + more, ..spec }.with(held))
}
