//! Valid chains of every kind, for those who commit and damage them.

use crate::{build, section, Spec, CLUSTER};
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_testkit::{Chain, Parts, ANCESTOR, MIDDLE, OVERLAY};

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
    let bitmap = Spec { sections: Some(vec![section(0x2038_5fae_252c_b34a, 0, &[0; 32])]), ..top.clone() };
    let longer = Spec::new(size + 300 * CLUSTER).newer().with(data(&[3, 200, 499], 0x25));
    let pairs = [
        (&top, &base, Some(&root)),
        (&top, &newer, Some(&root)),
        (&odd, &base, Some(&root)),
        (&top, &odd, None),
        (&bitmap, &newer, None),
        (&longer, &base, None),
        (&longer, &newer, None),
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
