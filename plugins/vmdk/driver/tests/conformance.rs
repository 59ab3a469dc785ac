//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at: the
//! other tests have large ones.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_images, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_vmdk_testkit::{build, Kit, Spec, State, GRAIN};

const SIZE: usize = 12 * GRAIN - 512;

/// How many of three commits are done, the images as they are and either of them with the sectors of the harness, and the
/// states of power losses that were looked at.
fn looked_at(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> (usize, usize) {
    let mut files = Files::from([(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))]);
    files.extend(ancestor.map(|ancestor| (ANCESTOR, build(ancestor))));
    let report = verify_images(&Kit, &files, Crashes { drawn: 0, seed: 1 });
    println!("{report:?}");
    assert_eq!(report.committed + report.refused, 3, "{report:?}");
    (report.committed, report.states)
}

fn conforms(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) {
    let (committed, states) = looked_at(overlay, backing, ancestor);
    assert!(committed == 3 && states > 30, "{committed}, {states}");
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

/// A footer names the directory of plain grains, too: what is appended would tear it.
#[test]
fn plain_grains_in_front_of_a_footer() {
    let backing = Spec { redundant: false, lazy_tables: true, footer: true, ..Spec::new(SIZE, 5, u32::MAX) };
    conforms(&overlay(), &backing, None);
    conforms(&overlay(), &backing.with([(0, State::Data(0x43)), (4, State::Data(0x44))]), None);
}

/// A new table takes the place of the footer: nothing names it before it is written.
#[test]
fn zeroes_into_a_table_in_the_place_of_the_footer() {
    let overlay = Spec::new(SIZE, 7, 5).with([(2, State::Zero)]);
    let ancestor = Spec::new(SIZE, 4, u32::MAX).with((0..12).map(|grain| (grain, State::Data(0x66))));
    let backing = Spec::new(SIZE, 5, 4);
    let backing = Spec { compressed: true, redundant: false, lazy_tables: true, footer: true, zeroed: true, ..backing };
    assert_eq!(looked_at(&overlay, &backing, Some(&ancestor)).0, 3);
}

#[test]
fn compressed_grains_into_one_without_tables() {
    let overlay = Spec { compressed: true, redundant: false, ..overlay() };
    let backing = Spec { lazy_tables: true, redundant: false, ..Spec::new(SIZE, 5, u32::MAX) };
    conforms(&overlay, &backing, None);
}

/// Into compressed grains, with tables in one copy and in two, in front and named by a footer: whatever a power loss leaves
/// of a commit is finished by running it again, which finds some of its grains in use.
#[test]
fn compressed_grains_into_compressed_ones() {
    let ancestor = Spec::new(SIZE, 4, u32::MAX).with((0..12).map(|grain| (grain, State::Data(0x66))));
    let empty = Spec { compressed: true, ..Spec::new(SIZE, 5, 4) };
    let held = empty.clone().with([(4, State::Data(0x44)), (9, State::Zero)]);
    let pairs = [
        (&empty, false, true),
        (&held, false, false),
        (&empty, true, false),
        (&held, true, false),
        (&held, true, true),
    ];
    let mut all = 0;
    for (redundant, lazy_tables, footer) in [(true, false, false), (true, true, false), (false, true, true)] {
        for (backing, over_ancestor, compressed) in pairs {
            let (parent, ancestor) = if over_ancestor { (4, Some(&ancestor)) } else { (u32::MAX, None) };
            let backing = Spec { redundant, lazy_tables, footer, parent, ..backing.clone() };
            let overlay = overlay().with((!compressed).then_some((2, State::Zero)));
            let (committed, states) = looked_at(&Spec { compressed, ..overlay }, &backing, ancestor);
            // The sectors of the harness fall into grains that are in use, too: such a commit is refused.
            assert!(committed == 3 || committed == 2 && !backing.grains.is_empty(), "{committed}");
            all += states;
        }
    }
    assert!(all > 300, "{all}");
}
