//! An image that gets another parent, which does not read the same: what differs is written into it first. At every
//! instant it reads what it read, through whichever parent it names, and the image above it still recognizes it.
#![allow(clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::crash::Crashes;
use instar_testkit::rebase::onto_another;
use instar_vmdk_testkit::{build, Kit, Spec, State, GRAIN};

fn rebased(top: Vec<u8>, old: Vec<u8>, new: Vec<u8>) {
    onto_another(&Kit, "vmdk", Crashes { drawn: 3, seed: 3 }, [top, old, new]);
}

const SIZE: usize = 20 * GRAIN - 512;

fn base(cid: u32, grains: &[(usize, u8)]) -> Vec<u8> {
    build(&Spec::new(SIZE, cid, u32::MAX).with(grains.iter().map(|&(grain, seed)| (grain, State::Data(seed)))))
}

#[test]
fn grains_that_are_new_and_zeroes_of_each_kind() {
    let old = base(4, &[(0, 0x41), (2, 0x42), (5, 0x43), (6, 0x43), (19, 0x44)]);
    let new = base(5, &[(0, 0x41), (2, 0x51), (3, 0x52), (4, 0x53), (6, 0x43)]);
    for zeroed in [true, false] {
        for redundant in [true, false] {
            for (lazy_tables, descriptor) in [(true, 1), (false, 3)] {
                let own = Spec { zeroed, redundant, lazy_tables, descriptor, ..Spec::new(SIZE, 7, 4) };
                let held = own.clone().with([(1, State::Data(0x21)), (5, State::Data(0x22))]);
                rebased(build(&own), old.clone(), new.clone());
                rebased(build(&held), old.clone(), new.clone());
            }
        }
    }
}

#[test]
fn compressed_grains() {
    let old = base(4, &[(0, 0x41), (2, 0x42)]);
    let new = base(5, &[(2, 0x51), (3, 0x52)]);
    for footer in [false, true] {
        let own = Spec { compressed: true, redundant: false, lazy_tables: footer, footer, ..Spec::new(SIZE, 7, 4) };
        rebased(build(&own.with([(1, State::Data(0x21))])), old.clone(), new.clone());
    }
}
