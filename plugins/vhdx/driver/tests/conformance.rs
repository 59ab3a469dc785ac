//! What is promised of every driver. The images are small, because every state that a power loss can leave is looked at.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{
    verify, verify_drawn, verify_images, verify_resize, Fixture, Report, ANCESTOR, OVERLAY,
};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::random::Random;
use instar_testkit::{crash_states_drawn, FormatKit, Place};
use instar_vhdx_testkit::{build, Kind, Kit, Linkage, Log, Spec, MIB};

/// A block that the disk does not fill, by far: the harness's own images have a run for every few sectors. But files
/// have several MiB, and each state is a copy of them.
const SIZE: usize = 18 * 4096;

/// `make crash` looks at more of them: each state is a copy of 10 MiB.
fn more() -> bool {
    crash_states_drawn().is_some()
}

fn crashes() -> Crashes {
    Crashes { drawn: usize::from(more()), seed: 1 }
}

fn files(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Files {
    let mut files = Files::from([(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))]);
    files.extend(ancestor.map(|ancestor| (ANCESTOR, build(ancestor))));
    files
}

/// The images as they are.
fn conforms(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) {
    let report = verify(&Fixture { overlay: &Kit, backing: &Kit, files: files(overlay, backing, ancestor) }, crashes());
    println!("{report:?}");
    assert!(report.committed == 1 && report.states >= 15, "{report:?}");
}

/// The same, and either of them with the sectors of the harness.
fn each_conforms(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Report {
    let report = verify_images(&Kit, &files(overlay, backing, ancestor), crashes());
    println!("{report:?}");
    report
}

fn overlay() -> Spec {
    let spec = Spec { id: 7, parent: [5; 16], ..Spec::new(Kind::Differencing, SIZE) };
    spec.with([(0, 3, 0x21), (30, 20, 0x22), (100, 20, 0x23), (143, 1, 0x24)])
}

fn backing() -> Spec {
    Spec::new(Kind::Differencing, SIZE).with([(1, 1, 0x43), (16, 16, 0x44)])
}

fn ancestor() -> Spec {
    Spec { id: 4, ..Spec::new(Kind::Dynamic, SIZE) }.with([(0, 110, 0x66), (130, 14, 0x67)])
}

#[test]
fn sectors_into_a_block_that_is_partially_there() {
    let report = each_conforms(&overlay(), &backing(), Some(&ancestor()));
    assert!(report.committed == 3 && report.states > 100, "{report:?}");
}

#[test]
fn sectors_into_a_block_that_is_not_there() {
    conforms(&overlay(), &Spec { runs: vec![], ..backing() }, Some(&ancestor()));
    // Another block has made the bitmap, and nobody has looked after the bits of this one.
    let size = MIB + SIZE;
    let base = Spec { garbage: 0x99, gap: 1, size, ..Spec { runs: vec![(2050, 9, 0x44)], ..backing() } };
    conforms(&Spec { linkage: Linkage::Alone, size, ..overlay() }, &base, None);
}

#[test]
fn zeroes_that_hide_the_parent() {
    let top = Spec { states: vec![(0, 2)], runs: vec![], ..overlay() };
    conforms(&top, &Spec { runs: vec![], ..backing() }, Some(&ancestor()));
    conforms(&top, &backing(), Some(&ancestor()));
    conforms(&overlay(), &Spec { states: vec![(0, 3 | 1 << 20)], runs: vec![], ..backing() }, Some(&ancestor()));
}

#[test]
fn into_a_dynamic_disk() {
    let base = Spec { kind: Kind::Dynamic, garbage: 0x99, tail: 1, runs: vec![], ..backing() };
    conforms(&overlay(), &base, None);
    let report = each_conforms(&Spec { hollow: vec![0], runs: vec![], ..overlay() }, &base, None);
    assert!(report.committed >= 2, "{report:?}");
}

#[test]
fn into_a_fixed_disk() {
    conforms(&overlay(), &Spec { kind: Kind::Fixed, ..backing() }, None);
}

#[test]
fn logs_that_are_to_be_replayed_first() {
    let pending = |spec: Spec| Spec { log: Log::Pending, ..spec };
    conforms(&pending(overlay()), &pending(backing()), Some(&pending(ancestor())));
    let stale = |spec: Spec| Spec { log: Log::Stale, both: false, ..spec };
    conforms(&stale(overlay()), &stale(backing()), None);
}

#[test]
fn linkages_that_could_be_torn() {
    conforms(&Spec { linkage: Linkage::Torn, table_last: true, ..overlay() }, &backing(), None);
}

#[test]
fn large_logical_sectors() {
    let large = |spec: Spec| Spec { sector: 4096, ..spec };
    let top = large(Spec { runs: vec![(0, 3, 0x21), (10, 4, 0x22)], ..overlay() });
    let base = large(Spec { runs: vec![(1, 1, 0x43), (5, 6, 0x44)], ..backing() });
    let report = each_conforms(&top, &base, None);
    assert!(report.committed == 3, "{report:?}");
}

#[test]
fn disks_that_grow() {
    let top = Spec { size: 2 * MIB, ..overlay() }.with([(2100, 9, 0x31)]);
    let base = Spec { garbage: 0x99, ..Spec::new(Kind::Dynamic, SIZE) }.with([(1, 1, 0x43), (100, 4, 0x44)]);
    conforms(&top, &base, None);
    conforms(&Spec { runs: vec![], ..top }, &Spec { log: Log::Pending, ..base }, None);
}

#[test]
fn drawn_images() {
    let count = if more() { 4 } else { 1 };
    let report = verify_drawn(&Kit, 0..count, Crashes { drawn: 0, seed: 1 });
    println!("{report:?}");
    assert!(report.committed as u64 > count && report.states as u64 > 25 * count, "{report:?}");
}

#[test]
fn images_grow() {
    let spec = Spec::new(Kind::Dynamic, SIZE).with([(1, 1, 0x43), (100, 4, 0x44)]);
    for spec in [Spec { garbage: 0x99, ..spec.clone() }, Spec { log: Log::Pending, ..spec }] {
        let files = Files::from([(DEVICE_OUTPUT, build(&spec))]);
        let (report, grown) = verify_resize(&Kit, &files, 2 * MIB as u64 + 512, crashes());
        println!("{report:?}");
        assert!(grown.is_some() && report.states >= 4, "{report:?}");
    }
}

/// The builder of the conformance tests makes only differencing images, and those do not grow: an image is as large as its
/// parent. So `verify_resizes` would see nothing but refusals, and these images are drawn as the chains of the fuzz targets are.
#[test]
fn drawn_images_grow() {
    let (mut grown, mut refused) = (0, 0);
    for number in 0..if more() { 24 } else { 6 } {
        let random = &mut Random::seeded(number);
        let (size, sector) = (*random.pick(&[64 << 10, MIB - 4096]), *random.pick(&[512, 4096]));
        let bytes = Kit.drawn(random, Place { size, number: 1, sector, has_parent: false }).unwrap();
        // To within the last block, to its end, and into others.
        let far = *random.pick(&[8, 2048, 4096]);
        // What is no multiple of the disk's sectors is rounded up: a second run would find a larger disk than it wants.
        let wanted = ((size as u64 / 512 + 1 + random.below(far)) * 512).next_multiple_of(sector as u64);
        let files = Files::from([(DEVICE_OUTPUT, bytes)]);
        let (report, after) = verify_resize(&Kit, &files, wanted, Crashes { drawn: 0, seed: number });
        println!("{size} to {wanted}: {report:?}");
        grown += usize::from(after.is_some());
        refused += report.refused;
    }
    // Fixed disks are refused.
    assert!(grown > refused && grown > 2, "{grown} grow, {refused} are refused");
}
