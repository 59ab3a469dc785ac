//! An image that gets another parent, which does not read the same: what differs is written into it first. At every
//! instant it reads what it read, through whichever parent it names, and the image above it still recognizes it.
#![allow(clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::crash::Crashes;
use instar_testkit::rebase::onto_another;
use instar_vdi_testkit::{build, Kit, Spec, State, BLOCK};

fn rebased(top: Vec<u8>, old: Vec<u8>, new: Vec<u8>) {
    onto_another(&Kit, "vdi", Crashes { drawn: 3, seed: 3 }, [top, old, new]);
}

const SIZE: usize = 12 * BLOCK - 512;

#[test]
fn blocks_that_are_new_and_zeroes() {
    let base = |number, blocks: &[(usize, u8)]| {
        build(&Spec::new(SIZE, number, 0).with(blocks.iter().map(|&(block, seed)| (block, State::Data(seed)))))
    };
    let old = base(3, &[(0, 0x41), (1, 0x42), (5, 0x43), (11, 0x44)]);
    let new = base(4, &[(0, 0x41), (1, 0x51), (7, 0x52)]);
    for held in [vec![], vec![(2, State::Data(0x21)), (4, State::Zero), (11, State::Data(0x23))]] {
        rebased(build(&Spec::new(SIZE, 5, 3).with(held)), old.clone(), new.clone());
    }
}
