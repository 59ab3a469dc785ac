//! L1 and L2 entries of an overlay past the end of its disk: QEMU leaves the state of a machine there when it goes back
//! to a snapshot that has one. They mean nothing to a reader, but they are emptied with the rest.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{Options, Step};
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::checker::{check, View};
use instar_qcow2_testkit::damage::put64;
use instar_qcow2_testkit::pair::{data, Pair};
use instar_qcow2_testkit::{be64, run_commit, OVERLAY};

const SIZE: u64 = 512;
/// Clusters that an L2 table maps.
const TABLE: u64 = SIZE / 8;

/// An overlay that holds these clusters; its disk then ends after the first `visible` of them.
fn overlay(spec: Spec, visible: u64) -> Vec<u8> {
    let mut bytes = build(&spec);
    put64(&mut bytes, 24, visible * SIZE);
    bytes
}

fn backing() -> Vec<u8> {
    build(&Spec::new(9, TABLE * SIZE).with(data([0, 7], 9)))
}

fn spec(clusters: impl IntoIterator<Item = u64>) -> Spec {
    Spec::new(9, 3 * TABLE * SIZE).with(data(clusters, 1))
}

/// Commit, and expect an overlay that is empty, without errors and leaks.
fn emptied(overlay: Vec<u8>, committed: u64) {
    let pair = Pair::of(overlay, backing());
    let mut io = pair.io();
    let outcome = run_commit(&mut io, Options::default()).unwrap();
    assert_eq!(outcome.clusters_committed, committed);
    let bytes = &io.files[&OVERLAY];
    assert!(View::new(bytes).entries().is_empty());
    let report = check(bytes);
    assert_eq!((report.errors, report.leaks), (vec![], 0));
    assert_eq!(check(&io.files[&DEVICE_OUTPUT]).errors, Vec::<String>::new());
}

#[test]
fn nothing_before_the_end_of_the_disk() {
    emptied(overlay(spec([TABLE, TABLE + 1, 2 * TABLE]), TABLE), 0);
    emptied(overlay(spec([3, TABLE, 2 * TABLE]), 0), 0);
}

#[test]
fn some_before_the_end_and_some_after_it() {
    emptied(overlay(spec([0, 3, TABLE, 2 * TABLE]), TABLE), 2);
    // The end lies within a table.
    emptied(overlay(spec([0, 3, 40, TABLE]), 10), 2);
}

#[test]
fn with_an_internal_snapshot_they_lose_one_reference() {
    for (clusters, visible, committed) in
        [(vec![0, 3, TABLE, 2 * TABLE], TABLE, 2), (vec![TABLE, 2 * TABLE], TABLE, 0), (vec![0, 3, 40, TABLE], 10, 2)]
    {
        emptied(overlay(Spec { snapshots: 1, ..spec(clusters) }, visible), committed);
    }
}

#[test]
fn with_an_internal_snapshot_they_are_verified_first() {
    let good = Spec { snapshots: 1, ..spec([0, 3, 40, TABLE]) }.with([(TABLE + 1, State::Zero)]);
    let at = |bytes: &[u8], index: u64| be64(bytes, (be64(bytes, 40) + index * 8) as usize) & 0x00ff_ffff_ffff_fe00;
    // In the table that the end of the disk lies in, in the one after it, and in the L1 table.
    let spoilers: [fn(&mut Vec<u8>, u64, u64); 3] = [
        |bytes, first, _| put64(bytes, first + 40 * 8, 1 << 40),
        |bytes, _, second| put64(bytes, second, 0x200),
        |bytes, _, _| {
            let at = be64(bytes, 40) + 8;
            put64(bytes, at, 1 << 40);
        },
    ];
    for spoil in spoilers {
        let mut bytes = overlay(good.clone(), 10);
        let (first, second) = (at(&bytes, 0), at(&bytes, 1));
        spoil(&mut bytes, first, second);
        let pair = Pair::of(bytes, backing());
        let mut io = pair.io();
        let failure = run_commit(&mut io, Options::default()).unwrap_err();
        assert_eq!((failure.step, failure.error.code), (Step::Check, ErrorCode::OverlayCorrupt), "{}", failure.error);
        assert_eq!(io.log, vec![], "something was changed");
    }
}
