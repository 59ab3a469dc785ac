//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at: the
//! other tests have large ones.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_drawn, verify_images, verify_resizes, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_vdi_testkit::{build, Kit, Spec, State, BLOCK};

const SIZE: usize = 12 * BLOCK - 512;

fn conforms(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) {
    let mut files = Files::from([(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))]);
    files.extend(ancestor.map(|ancestor| (ANCESTOR, build(ancestor))));
    let report = verify_images(&Kit, &files, Crashes { drawn: 1, seed: 1 });
    println!("{report:?}");
    // As they are, and either of them with the sectors of the harness.
    assert!(report.committed == 3 && report.states > 60, "{report:?}");
}

fn overlay() -> Spec {
    Spec::new(SIZE, 3, 2).with([(0, State::Data(0x21)), (1, State::Data(0x22)), (11, State::Data(0x23))])
}

#[test]
fn zeroes_over_an_ancestor() {
    let overlay = overlay().with([(2, State::Zero), (3, State::Zero)]);
    let backing = Spec::new(SIZE, 2, 1).with([(0, State::Data(0x43)), (2, State::Data(0x44)), (4, State::Zero)]);
    let ancestor = Spec::new(SIZE, 1, 0).with((0..10).map(|block| (block, State::Data(0x66))));
    conforms(&overlay, &backing, Some(&ancestor));
    conforms(&overlay, &Spec { gaps: vec![0, 2], ..backing }, Some(&ancestor));
}

#[test]
fn into_a_static_base() {
    conforms(
        &overlay().with([(5, State::Zero)]),
        &Spec::new(SIZE, 2, 0).with([(3, State::Data(9))]).preallocated(),
        None,
    );
}

#[test]
fn into_a_base_that_grows() {
    let overlay = Spec::new(SIZE + 120 * BLOCK, 3, 2).with([
        (0, State::Data(0x21)),
        (12, State::Data(0x22)),
        (130, State::Data(0x23)),
        (15, State::Zero),
    ]);
    let backing = Spec::new(SIZE, 2, 1).with([(0, State::Data(0x43)), (11, State::Data(0x44)), (4, State::Zero)]);
    let ancestor = Spec::new(SIZE + 20 * BLOCK, 1, 0).with((0..20).map(|block| (block, State::Data(0x66))));
    for backing in [
        // The map has room, and has none; blocks in the way, gaps among them.
        Spec { room: 300, entries: 30, ..backing.clone() },
        Spec { gaps: vec![0, 2], ..backing.clone() },
        backing.with((1..4).map(|block| (block, State::Data(0x45)))),
    ] {
        conforms(&overlay, &backing, Some(&ancestor));
    }
}

#[test]
fn drawn_images() {
    let report = verify_drawn(&Kit, 0..10, Crashes { drawn: 1, seed: 1 });
    println!("{report:?}");
    assert!(report.committed > 20 && report.states > 400, "{report:?}");
}

#[test]
fn images_grow() {
    let report = verify_resizes(&Kit, 0..24, Crashes { drawn: 0, seed: 1 });
    println!("{report:?}");
    assert!(report.committed >= 24 && report.refused > 0 && report.states > 70, "{report:?}");
}
