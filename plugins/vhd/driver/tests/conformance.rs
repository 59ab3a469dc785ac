//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_drawn, verify_images, verify_resizes, Report, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_vhd_testkit::{build, Kind, Kit, Spec};

const SIZE: usize = 9 * 8192 - 1024;

fn verified(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Report {
    let mut files = Files::from([(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))]);
    files.extend(ancestor.map(|ancestor| (ANCESTOR, build(ancestor))));
    let report = verify_images(&Kit, &files, Crashes { drawn: 1, seed: 1 });
    println!("{report:?}");
    report
}

/// As they are, and either of them with the sectors of the harness.
fn conforms(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) {
    let report = verified(overlay, backing, ancestor);
    assert!(report.committed == 3 && report.states > 30, "{report:?}");
}

fn overlay() -> Spec {
    let spec = Spec { id: 7, parent: 5, ..Spec::new(Kind::Differencing, SIZE, 8192) };
    spec.with([(0, 3, 0x21), (14, 20, 0x22), (140, 2, 0x23)])
}

fn backing() -> Spec {
    Spec::new(Kind::Differencing, SIZE, 8192).with([(1, 1, 0x43), (16, 16, 0x44)])
}

fn ancestor() -> Spec {
    Spec { id: 4, ..Spec::new(Kind::Dynamic, SIZE, 4096) }.with([(0, 100, 0x66), (141, 1, 0x67)])
}

#[test]
fn differencing_over_an_ancestor() {
    conforms(&overlay(), &backing(), Some(&ancestor()));
    conforms(&Spec { hollow: vec![5], ..overlay() }, &Spec { garbage: 0x99, gap: 1, ..backing() }, Some(&ancestor()));
}

#[test]
fn into_a_dynamic_disk() {
    let backing = Spec { kind: Kind::Dynamic, garbage: 0x99, ..backing() };
    conforms(&overlay(), &backing, None);
    conforms(&Spec { block: 65536, ..overlay() }, &Spec { block: 65536, ..backing }, None);
}

#[test]
fn into_a_fixed_disk() {
    conforms(&overlay(), &Spec { kind: Kind::Fixed, ..backing() }, None);
}

#[test]
fn with_a_batmap_on_either_side() {
    let full = overlay().with([(32, 16, 0x29)]);
    let backing = backing().with([(64, 16, 0x49)]);
    conforms(&Spec { batmap: true, ..full }, &Spec { batmap: true, ..backing.clone() }, Some(&ancestor()));
    let dangling = |spec: Spec| Spec { batmap: true, dangling: true, ..spec };
    conforms(&dangling(overlay()), &dangling(backing), Some(&ancestor()));
}

#[test]
fn tables_behind_the_blocks_and_footers_that_are_missing() {
    let overlay = Spec { table_last: true, ..overlay() };
    conforms(&overlay, &Spec { table_last: true, ..backing() }, Some(&ancestor()));
    conforms(&Spec { tail: false, ..overlay.clone() }, &Spec { tail: false, ..backing() }, Some(&ancestor()));
    conforms(&Spec { head: false, ..overlay }, &Spec { head: false, ..backing() }, Some(&ancestor()));
}

#[test]
fn disks_that_grow() {
    for (batmap, spare) in [(false, 0), (false, 9), (true, 0), (true, 9)] {
        for size in [5 * 8192, 5 * 8192 - 1024] {
            let runs = [(1, 1, 0x43), (72, 4, 0x44)];
            let base = Spec { batmap, spare, garbage: 0x99, ..Spec::new(Kind::Dynamic, size, 8192) }.with(runs);
            let report = verified(&overlay(), &base, None);
            assert!(report.committed >= 2 && report.states > 60, "{report:?}");
            let report = verified(&Spec { runs: vec![], ..overlay() }, &base, None);
            assert!(report.committed >= 2, "{report:?}");
        }
    }
    let report = verified(&overlay(), &Spec::new(Kind::Fixed, 5 * 8192 - 512, 0).with([(1, 1, 0x43)]), None);
    assert!(report.committed >= 2, "{report:?}");
}

#[test]
fn drawn_images() {
    let report = verify_drawn(&Kit, 0..24, Crashes { drawn: 1, seed: 1 });
    println!("{report:?}");
    assert!(report.committed > 40 && report.states > 2000, "{report:?}");
}

#[test]
fn images_grow() {
    let report = verify_resizes(&Kit, 0..24, Crashes { drawn: 0, seed: 1 });
    println!("{report:?}");
    assert!(report.committed >= 12 && report.refused > 0 && report.states > 200, "{report:?}");
}
