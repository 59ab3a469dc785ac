//! Free clusters within the file of the backing are used again, and only if they are free.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::pair::{commit_and_verify, data, expected, verify_crashes, views, Pair};
use instar_qcow2_testkit::{be64, run_commit};

fn overlay() -> Spec {
    // Whole clusters and, as the overlay's are smaller, parts of one that something else fills up.
    Spec::new(11, 64 << 12).with(data([0, 1, 20, 21, 22], 0x40)).with([(60, State::Zero), (63, State::Data(5))])
}

fn backing(free: u64) -> Spec {
    Spec { free, ..Spec::new(12, 64 << 12) }.with(data([3, 30, 40], 0x80))
}

#[test]
fn the_file_grows_only_by_what_is_missing() {
    for (free, snapshots) in [(0, 0), (2, 0), (3, 1), (50, 0), (50, 2)] {
        let mut pair = Pair::new(&overlay(), &Spec { snapshots, ..backing(free) });
        for ancestor in [false, true] {
            pair.ancestor = ancestor.then(|| build(&Spec::new(12, 64 << 12).with(data(0..64, 0x77))));
            let length = pair.backing.len();
            let io = commit_and_verify(&pair);
            let grown = (io.files[&DEVICE_OUTPUT].len() - length) as u64 >> 12;
            // With a snapshot, copies of a cluster of which a part becomes zero, and of the L2 table.
            let wanted: u64 = 4 + if snapshots > 0 { 2 } else { 0 };
            let tables = if snapshots > 0 { 1 + snapshots as u64 } else { 1 };
            let used = if free >= tables { free } else { 0 };
            assert_eq!(grown, wanted.saturating_sub(used), "{free} free, {snapshots} snapshots, {ancestor}");
        }
    }
}

#[test]
fn every_crash_point() {
    for (free, snapshots) in [(3, 0), (50, 1)] {
        let mut pair = Pair::new(&overlay(), &Spec { snapshots, ..backing(free) });
        pair.ancestor = Some(build(&Spec::new(12, 64 << 12).with(data(0..64, 0x77))));
        verify_crashes(&pair);
    }
}

/// Refcount 0 but in use: the commit neither touches such a cluster nor what it would have overwritten.
#[test]
fn data_with_refcount_0_is_not_overwritten() {
    for snapshots in [0, 1] {
        let mut pair = Pair::new(&overlay(), &Spec { snapshots, ..backing(3) });
        // The data cluster of guest cluster 40, which the overlay does not hold.
        let l2 = be64(&pair.backing, be64(&pair.backing, 40) as usize) & 0x00ff_ffff_ffff_fe00;
        let host = be64(&pair.backing, l2 as usize + 40 * 8) & 0x00ff_ffff_ffff_fe00;
        let block = be64(&pair.backing, be64(&pair.backing, 48) as usize) as usize;
        let at = block + (host >> 12) as usize * 2;
        pair.backing[at..at + 2].fill(0);
        let length = pair.backing.len();
        let (backing, overlay) = expected(&pair);
        let mut io = pair.io();
        run_commit(&mut io, Options::default()).unwrap();
        assert!(views(&io.files) == (backing, overlay), "wrong content");
        assert!(io.files[&DEVICE_OUTPUT].len() > length, "free clusters of a damaged image were used");
    }
}
