//! An image that gets another parent, which does not read the same: what differs is written into it first. At every
//! instant it reads what it read, through whichever parent it names, and the image above it still recognizes it.
#![allow(clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::crash::Crashes;
use instar_testkit::rebase::onto_another;
use instar_vhdx_testkit::{build, Kind, Kit, Log, Spec};

fn rebased(top: Vec<u8>, old: Vec<u8>, new: Vec<u8>) {
    onto_another(&Kit, "vhdx", Crashes { drawn: 0, seed: 3 }, [top, old, new]);
}

const SIZE: usize = 18 * 4096;

#[test]
fn blocks_and_sectors_with_a_log() {
    let base = |id, runs: &[(usize, usize, u8)]| {
        build(&Spec { id, ..Spec::new(Kind::Dynamic, SIZE) }.with(runs.iter().copied()))
    };
    let old = base(3, &[(0, 2, 0x41), (18, 10, 0x42), (64, 5, 0x43), (130, 12, 0x44)]);
    let new = base(4, &[(0, 2, 0x41), (20, 3, 0x51), (80, 9, 0x52)]);
    let own = Spec { log: Log::Pending, id: 7, ..Spec::new(Kind::Differencing, SIZE) };
    rebased(build(&own.with([(1, 3, 0x21), (30, 20, 0x22), (143, 1, 0x24)])), old, new);
}
