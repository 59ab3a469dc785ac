//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at: the
//! other tests have large ones.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_images, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_vmdk_testkit::{build, Kit, Spec, State, GRAIN};

const SIZE: usize = 12 * GRAIN - 512;

fn conforms(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) {
    let mut files = Files::from([(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))]);
    files.extend(ancestor.map(|ancestor| (ANCESTOR, build(ancestor))));
    let report = verify_images(&Kit, &files, Crashes { drawn: 0, seed: 1 });
    // As they are, and either of them with the sectors of the harness.
    assert!(report.committed == 3 && report.states > 30, "{report:?}");
}

fn overlay() -> Spec {
    Spec::new(SIZE, 7, 5).with([(0, State::Data(0x21)), (1, State::Data(0x22)), (11, State::Data(0x23))])
}

#[test]
fn zeroed_grains_over_an_ancestor() {
    let overlay = overlay().with([(2, State::Zero), (3, State::Zero)]);
    let backing = Spec::new(SIZE, 5, 4).with([(0, State::Data(0x43)), (2, State::Data(0x44)), (4, State::Zero)]);
    let ancestor = Spec::new(SIZE, 4, u32::MAX).with((0..10).map(|grain| (grain, State::Data(0x66))));
    conforms(&overlay, &backing, Some(&ancestor));
}

#[test]
fn compressed_grains_into_one_without_tables() {
    let overlay = Spec { compressed: true, redundant: false, ..overlay() };
    let backing = Spec { lazy_tables: true, redundant: false, ..Spec::new(SIZE, 5, u32::MAX) };
    conforms(&overlay, &backing, None);
}
