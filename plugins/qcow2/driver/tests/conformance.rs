//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at: the
//! other tests have large ones.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_images, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::pair::data;
use instar_qcow2_testkit::Kit;

fn conforms(files: Vec<(u32, Vec<u8>)>) {
    let report = verify_images(&Kit, &Files::from_iter(files), Crashes { drawn: 0, seed: 1 });
    // As they are, and either of them with the sectors of the harness.
    assert!(report.committed == 3 && report.states > 30, "{report:?}");
}

#[test]
fn clusters_of_every_kind_over_an_ancestor() {
    let overlay = Spec::new(9, (12 << 9) - 512).with(data([0, 5], 0x21)).with([
        (1, State::Zero),
        (2, State::ZeroAllocated(9)),
        (3, State::Deflated(3)),
    ]);
    let backing = Spec::new(10, 8 << 10).with(data([0, 2], 0x43)).with([(1, State::Zero), (3, State::Deflated(5))]);
    let ancestor = Spec::new(9, 9 << 9).with(data(0..9, 0x66));
    conforms(vec![(OVERLAY, build(&overlay)), (DEVICE_OUTPUT, build(&backing)), (ANCESTOR, build(&ancestor))]);
}

#[test]
fn subclusters_under_a_snapshot() {
    let mixed = [(0, State::Mixed(0x71, 0xff00, 0xff)), (1, State::MixedZero(0xf0f))];
    let overlay = Spec { extended: true, ..Spec::new(14, 3 << 14) }.with(mixed);
    let backing = Spec { extended: true, snapshots: 1, ..Spec::new(14, 3 << 14) };
    let backing = backing.with([(0, State::Mixed(0x17, 0xf, 0xf0)), (2, State::Deflated(4))]);
    conforms(vec![(OVERLAY, build(&overlay)), (DEVICE_OUTPUT, build(&backing))]);
}

#[test]
fn a_backing_that_grows() {
    let overlay = Spec::new(9, 70 << 9).with(data([1, 69], 0x21));
    let backing = Spec::new(9, 4 << 9).with(data([0, 3], 0x43));
    conforms(vec![(OVERLAY, build(&overlay)), (DEVICE_OUTPUT, build(&backing))]);
}
