//! An image that gets another parent, which does not read the same: what differs is written into it first. At every
//! instant it reads what it read, through whichever parent it names, and the image above it still recognizes it.
#![allow(clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::crash::Crashes;
use instar_testkit::rebase::onto_another;
use instar_vhd_testkit::{build, Kind, Kit, Spec};

fn rebased(top: Vec<u8>, old: Vec<u8>, new: Vec<u8>) {
    onto_another(&Kit, "vpc", Crashes { drawn: 3, seed: 3 }, [top, old, new]);
}

const SIZE: usize = 9 * 8192 - 1024;

#[test]
fn blocks_that_are_new_and_sectors_of_those_that_are_there() {
    let base = |runs: &[(usize, usize, u8)]| build(&Spec::new(Kind::Dynamic, SIZE, 8192).with(runs.iter().copied()));
    let old = base(&[(0, 2, 0x41), (18, 10, 0x42), (64, 5, 0x43), (130, 12, 0x44)]);
    let new = base(&[(0, 2, 0x41), (20, 3, 0x51), (80, 9, 0x52)]);
    for (batmap, tail) in [(false, true), (true, true), (false, false)] {
        let own = Spec { batmap, tail, ..Spec::new(Kind::Differencing, SIZE, 8192) };
        rebased(build(&own), old.clone(), new.clone());
        rebased(build(&own.with([(1, 3, 0x21), (17, 4, 0x22), (140, 2, 0x23)])), old.clone(), new.clone());
    }
}
