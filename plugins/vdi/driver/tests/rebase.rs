//! An image that gets another parent, which does not read the same: what differs is written into it first. At every
//! instant it reads what it read, through whichever parent it names, and the image above it still recognizes it.
#![allow(clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::crash::{Crashes, Files};
use instar_testkit::rebase::{Below, Rebased, Seen};
use instar_vdi_testkit::{build, Kit, Spec, State, BLOCK};

const OLD: u32 = 3;
const NEW: u32 = 4;
const CRASHES: Crashes = Crashes { drawn: 3, seed: 3 };
const UNDER_OLD: Below<'_> = (b"old", &[OLD]);
const UNDER_NEW: Below<'_> = (b"new", &[NEW]);

fn rebased(top: Vec<u8>, old: Vec<u8>, new: Vec<u8>) -> Seen {
    let files = Files::from([(DEVICE_OUTPUT, top), (OLD, old), (NEW, new)]);
    let rebase = Rebased { kit: &Kit, format: "vdi", files, old: UNDER_OLD, new: UNDER_NEW };
    let (seen, _) = rebase.verify(CRASHES);
    println!("{seen:?}");
    assert!(seen.bytes > 0 && seen.states > 5 && seen.between > 0, "{seen:?}");
    seen
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
