//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at: the
//! other tests have large ones.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_drawn, verify_images, verify_resizes, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_parallels_testkit::{build, section, Kit, Spec, CLUSTER, OPEN};

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
    Spec::new(SIZE).newer().with([(0, 0x21), (1, 0x22), (2, 0x23), (64, 0x24), (69, 0x25)])
}

#[test]
fn data_over_an_ancestor() {
    let backing = Spec::new(SIZE).with([(0, 0x43), (2, 0x44), (3, 0x45), (1, 0x46)]);
    let ancestor = Spec::new(SIZE).newer().with((0..10).map(|cluster| (cluster, 0x66)));
    conforms(&overlay(), &backing, Some(&ancestor));
    // A crash left something behind what is used, or did not close an image.
    let left = Spec { tail: 5 * CLUSTER + 77, in_use: OPEN, gaps: vec![0, 2], ..backing.newer() };
    conforms(&overlay(), &left, Some(&ancestor));
    conforms(&Spec { in_use: OPEN, ..overlay() }, &left, Some(&ancestor));
}

#[test]
fn clusters_of_other_sizes() {
    let odd = Spec::new(SIZE).of_tracks(3).with([(0, 0x31), (3, 0x32), (46, 0x33)]);
    let ancestor = Spec::new(SIZE).newer().with((0..70).map(|cluster| (cluster, 0x66)));
    conforms(&odd, &overlay(), Some(&ancestor));
    conforms(&overlay(), &odd, Some(&ancestor));
    conforms(&overlay(), &Spec { says_where: true, room: 2, ..odd }, Some(&ancestor));
}

#[test]
fn what_the_header_says_goes() {
    let bitmap = vec![section(0x2038_5fae_252c_b34a, 0, &[0; 32])];
    let empty = Spec { flags: 1, sections: Some(bitmap.clone()), ..Spec::new(SIZE) };
    conforms(&Spec { sections: Some(bitmap), in_use: 0, ..overlay() }, &empty, None);
}

#[test]
fn into_a_base_that_grows() {
    // Within the available room, and with clusters in the way.
    for size in [60, 300] {
        let base = Spec::new(40 * CLUSTER - 512).with([(3, 9), (39, 10), (7, 11)]);
        let longer = Spec::new(size * CLUSTER).newer().with([(2, 0x31), (39, 0x33), (59, 0x32)]);
        conforms(&longer, &base, None);
        conforms(&longer, &Spec { tail: 3 * CLUSTER, ..base.newer() }, None);
    }
}

#[test]
fn drawn_images() {
    let report = verify_drawn(&Kit, 0..10, Crashes { drawn: 1, seed: 1 });
    println!("{report:?}");
    assert!(report.committed > 20 && report.states > 200, "{report:?}");
}

#[test]
fn images_grow() {
    let report = verify_resizes(&Kit, 0..12, Crashes { drawn: 0, seed: 1 });
    println!("{report:?}");
    assert!(report.committed >= 12 && report.refused > 0 && report.states > 40, "{report:?}");
}
