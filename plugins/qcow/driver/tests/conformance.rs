//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at: the
//! other tests have large ones.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_drawn, verify_images, verify_resizes, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_qcow_testkit::{build, Kit, Spec, State, CLUSTER};

const SIZE: usize = 70 * CLUSTER - 512;

fn conforms(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) {
    let mut files = Files::from([(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))]);
    files.extend(ancestor.map(|ancestor| (ANCESTOR, build(ancestor))));
    let report = verify_images(&Kit, &files, Crashes { drawn: 1, seed: 1 });
    println!("{report:?}");
    // As they are, and either of them with the sectors of the harness.
    assert!(report.committed == 3 && report.states > 20, "{report:?}");
}

fn overlay() -> Spec {
    let spec =
        Spec::new(SIZE, b"base").with([(0, State::Data(0x21)), (1, State::Packed(0x22)), (2, State::Data(0x23))]);
    spec.with([(64, State::Packed(0x24)), (69, State::Data(0x25))])
}

#[test]
fn data_over_an_ancestor() {
    let backing = Spec::new(SIZE, b"root").with([(0, State::Packed(0x43)), (2, State::Data(0x44))]);
    let backing = backing.with([(3, State::Packed(0x45)), (1, State::Packed(0x46))]);
    let ancestor = Spec::new(SIZE, b"").with((0..10).map(|cluster| (cluster, State::Data(0x66))));
    conforms(&overlay(), &backing, Some(&ancestor));
    // A crash left something behind what is used.
    conforms(&overlay(), &Spec { tail: 5 * CLUSTER + 77, ..backing }, Some(&ancestor));
}

#[test]
fn into_a_base_that_grows() {
    let base = Spec::new(50 * CLUSTER - 512, b"").with([(3, State::Data(9)), (49, State::Packed(10))]);
    conforms(&overlay(), &base, None);
    let base = Spec { tail: 3 * CLUSTER, ..Spec::new(50 * CLUSTER - 512, b"").with([(49, State::Data(10))]) };
    conforms(&overlay(), &base, None);
    let longer = Spec { size: 200 * CLUSTER, ..overlay() }.with([(130, State::Data(0x31)), (199, State::Data(0x32))]);
    conforms(&longer, &base, None);
}

#[test]
fn drawn_images() {
    let report = verify_drawn(&Kit, 0..10, Crashes { drawn: 1, seed: 1 });
    println!("{report:?}");
    assert!(report.committed > 20 && report.states > 200, "{report:?}");
}

#[test]
fn images_grow() {
    let report = verify_resizes(&Kit, 0..24, Crashes { drawn: 0, seed: 1 });
    println!("{report:?}");
    assert!(report.committed >= 24 && report.refused > 0 && report.states > 50, "{report:?}");
}
