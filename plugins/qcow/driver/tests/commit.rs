//! The commit over in-memory qcow images: content, consistency, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::FormatDriver;
use instar_guest_view::Ancestors;
use instar_qcow_driver::Qcow;
use instar_qcow_testkit::pair::{files, views, Files, ANCESTOR, MIDDLE, OVERLAY};
use instar_qcow_testkit::{build, crashes, device, put64, Spec, State, View, CLUSTER};
use std::collections::BTreeSet;

const GROW: Options = Options { keep_overlay: false, dry_run: false, resize_backing: true };
const SIZE: usize = 300 * CLUSTER;

fn run(io: &mut MemoryDevices, options: Options) -> Result<Outcome, CommitFailure> {
    instar_qcow_testkit::pair::run(io, options, i64::MAX as u64)
}

fn expected(files: &Files) -> (Vec<u8>, Vec<u8>) {
    let (mut backing, overlay) = views(files);
    if backing.len() < overlay.len() {
        backing.resize(overlay.len(), 0);
    }
    backing[..overlay.len()].copy_from_slice(&overlay);
    (backing, overlay)
}

fn assert_finished(files: &Files, (backing, overlay): &(Vec<u8>, Vec<u8>)) {
    let now = views(files);
    assert!(now.0 == *backing, "the backing reads wrong");
    assert!(now.1 == *overlay, "the overlay reads wrong");
    View::new(&files[&DEVICE_OUTPUT]).assert_whole();
    let top = View::new(&files[&OVERLAY]);
    assert_eq!((top.held(), top.bytes.len()), (0, top.l1.end), "the overlay gives its space back");
}

fn commit_and_verify(files: &Files) -> MemoryDevices {
    let want = expected(files);
    let held = View::new(&files[&OVERLAY]).held() as u64;
    let mut io = MemoryDevices::new(files.clone());
    let outcome = run(&mut io, GROW).unwrap();
    assert_eq!((outcome.clusters_committed, outcome.overlay_clusters_cleared), (held, held));
    assert_finished(&io.files, &want);
    assert_eq!(io.unflushed(), BTreeSet::new());
    io
}

fn verify_crashes(before: &Files) {
    let want = expected(before);
    let done = commit_and_verify(before);
    let states = crashes().each(before, &done.log, &mut |files| {
        assert!(views(&files).1 == want.1, "the overlay changed its content");
        for number in [OVERLAY, DEVICE_OUTPUT] {
            View::new(&files[&number]).assert_consistent();
        }
        let mut io = MemoryDevices::new(files);
        run(&mut io, GROW).unwrap();
        assert_finished(&io.files, &want);
        // Clusters of tables that nothing refers to yet may lie between others: that is all that is lost.
        let [first, again, done] = [before, &io.files, &done.files].map(|files| files[&DEVICE_OUTPUT].len());
        assert!(again <= done + (done - first), "{again} bytes, {done} without the crash");
    });
    assert!(states > 1);
    println!("crash states: {states}");
}

fn data(clusters: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    clusters.into_iter().map(|cluster| (cluster, State::Data(seed))).collect()
}

fn packed(clusters: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    clusters.into_iter().map(|cluster| (cluster, State::Packed(seed))).collect()
}

fn pair() -> (Spec, Spec) {
    let top = Spec::new(SIZE, b"base").with(data([0, 1, 2, 9, 200, 299], 0x40)).with(packed([3, 4, 201], 0x41));
    (top, Spec::new(SIZE, b"").with(data([1, 9, 30], 0x80)).with(packed([2, 3, 31], 0x81)))
}

#[test]
fn data_over_everything() {
    let (top, base) = pair();
    verify_crashes(&files(&top, &base, None));
    verify_crashes(&files(&top, &Spec { tail: 4 * CLUSTER + 9, ..base.clone() }, None));
    let root = Spec::new(SIZE, b"").with(data([0, 1, 2, 3, 299], 0x11)).with(packed([4, 5], 0x12));
    verify_crashes(&files(&top, &Spec { name: b"root".to_vec(), ..base }, Some(&root)));
}

/// A cluster of the backing has many of the overlay: what is around the data comes from below, and from streams.
#[test]
fn parts_of_clusters() {
    let top = Spec { cluster_bits: 9, l2_bits: 7, ..Spec::new(SIZE, b"base") };
    let top = top.with(data([0, 5, 8, 9, 10, 33, 599], 0x40)).with(packed([1, 34], 0x41));
    let base = Spec { cluster_bits: 11, ..Spec::new(SIZE, b"root") }.with(packed([2, 8], 0x81)).with(data([149], 0x82));
    let root = Spec::new(SIZE, b"").with(data([0, 1, 2, 3, 4, 5, 298, 299], 0x11));
    verify_crashes(&files(&top, &base, Some(&root)));
    verify_crashes(&files(&top, &base, Some(&Spec { size: 5 * CLUSTER, clusters: data([4], 0x12), ..root })));
    verify_crashes(&files(&top, &Spec { name: Vec::new(), ..base }, None));
}

#[test]
fn tables_of_other_sizes() {
    let (top, base) = pair();
    // A table shorter than a cluster, and one that is longer.
    for (cluster_bits, l2_bits) in [(12, 6), (9, 8)] {
        let base = Spec { cluster_bits, l2_bits, ..base.clone() };
        verify_crashes(&files(&Spec { cluster_bits, l2_bits, ..top.clone() }, &base, None));
    }
}

#[test]
fn growth() {
    let (top, base) = pair();
    for size in [64 * CLUSTER, 64 * CLUSTER + 512, 270 * CLUSTER - 512, 299 * CLUSTER] {
        let base = Spec { size, ..base.clone() };
        verify_crashes(&files(&top, &base, None));
        let last = size.div_ceil(CLUSTER) - 1;
        // What lies past the end of the disk is not seen when it grows.
        verify_crashes(&files(&top, &base.clone().with(data([last], 0x91)), None));
        verify_crashes(&files(&top, &base.with(packed([last], 0x91)), None));
    }
    // An overlay that holds nothing.
    let before = files(&Spec::new(SIZE, b"base"), &Spec { size: 100 * CLUSTER + 512, ..base }, None);
    verify_crashes(&before);
}

#[test]
fn what_cannot_grow_says_why() {
    let (top, base) = pair();
    let short = Spec { size: 100 * CLUSTER, name: b"root".to_vec(), ..base.clone() };
    let root = Spec::new(200 * CLUSTER, b"").with(data([150], 0x11));
    let beyond = Spec { size: 100 * CLUSTER, name: Vec::new(), ..base }.with(data([127], 0x33));
    for (before, why) in [
        (files(&top, &short, Some(&root)), "what lies below it is longer"),
        (files(&top, &beyond, None), "1 clusters past the end"),
    ] {
        let mut io = MemoryDevices::new(before.clone());
        let failure = run(&mut io, GROW).unwrap_err();
        assert!(failure.error.text.contains(why) && io.files == before, "{}", failure.error);
    }
    // No longer than the backing: that is no reason.
    let root = Spec::new(100 * CLUSTER, b"").with(data([99], 0x11));
    verify_crashes(&files(&top, &short, Some(&root)));
}

#[test]
fn several_layers_at_once() {
    let (top, base) = pair();
    let mut before = files(&top, &base, None);
    before.insert(MIDDLE, build(&Spec::new(SIZE, b"base").with(data([1, 5], 0x61)).with(packed([6, 200], 0x62))));
    let overlay = views(&before).1;
    let keep = Options { keep_overlay: true, ..Options::default() };
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, keep).unwrap();
    assert!(views(&io.files) == (overlay.clone(), overlay.clone()));
    let states = crashes().each(&before, &io.log, &mut |files| {
        assert!(views(&files).1 == overlay);
        let mut io = MemoryDevices::new(files);
        run(&mut io, keep).unwrap();
        assert!(views(&io.files) == (overlay.clone(), overlay.clone()));
    });
    println!("crash states: {states}");
}

#[test]
fn damage_is_found_before_anything_changes() {
    let (top, base) = pair();
    let good = files(&top, &base, None);
    type Damage = (&'static str, fn(&mut Vec<u8>, usize));
    let damages: [Damage; 7] = [
        ("is not the start of a cluster", |bytes, table| put64(bytes, table, 700)),
        ("past the end of the file", |bytes, table| put64(bytes, table + 40, 1 << 40)),
        ("L1 table lie", |bytes, table| put64(bytes, table + 40, 1 << 63 | 5 << 53 | 50)),
        ("stream of 0 bytes", |bytes, table| put64(bytes, table + 40, 1 << 63 | 5000)),
        ("something else uses", |bytes, table| put64(bytes, table + 40, table as u64)),
        ("something else uses", |bytes, table| put64(bytes, table + 40, 1 << 63 | 5 << 53 | table as u64)),
        ("an L1 entry", |bytes, table| {
            let l1 = View::new(bytes).l1.start;
            put64(bytes, l1 + 8, table as u64);
        }),
    ];
    for number in [OVERLAY, DEVICE_OUTPUT] {
        for (name, damage) in &damages {
            let mut damaged = good.clone();
            let table = View::new(&good[&number]).tables[0].start;
            damage(damaged.get_mut(&number).unwrap(), table);
            let mut io = MemoryDevices::new(damaged.clone());
            let failure = run(&mut io, Options::default()).unwrap_err();
            let code = if number == OVERLAY { ErrorCode::OverlayCorrupt } else { ErrorCode::BackingCorrupt };
            assert_eq!(failure.error.code, code, "{name}: {}", failure.error);
            assert!(failure.error.text.contains(name) || name.contains("L1 entry"), "{name}: {}", failure.error);
            assert_eq!(io.files, damaged, "{name}");
        }
    }
}

#[test]
fn streams_that_do_not_decode_stop_the_commit() {
    let (top, base) = pair();
    let mut before = files(&top, &base, None);
    let view = View::new(&before[&OVERLAY]);
    let at = (view.entries[&3] & ((1 << 53) - 1)) as usize;
    before.get_mut(&OVERLAY).unwrap()[at..at + 8].fill(0xff);
    let mut io = MemoryDevices::new(before.clone());
    let failure = run(&mut io, Options::default()).unwrap_err();
    assert!(failure.error.text.contains("does not decode"), "{}", failure.error);
    assert_eq!(io.files[&OVERLAY], before[&OVERLAY]);
}

#[test]
fn encrypted_images_are_refused() {
    let (top, base) = pair();
    for number in [OVERLAY, DEVICE_OUTPUT] {
        let mut before = files(&top, &base, None);
        before.get_mut(&number).unwrap()[39] = 1;
        let mut io = MemoryDevices::new(before.clone());
        let failure = run(&mut io, Options::default()).unwrap_err();
        assert_eq!(failure.error.code, ErrorCode::UnsupportedFormat);
        assert!(failure.error.text.contains("encrypted") && io.files == before, "{}", failure.error);
    }
}

#[test]
fn too_little_room_is_found_before_anything_changes() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    let after = commit_and_verify(&before).files[&DEVICE_OUTPUT].len() as u64;
    for (length, enough) in [(after, true), (after - 1, false)] {
        let mut io = MemoryDevices::new(before.clone());
        match instar_qcow_testkit::pair::run(&mut io, Options::default(), length) {
            Ok(_) => assert!(enough),
            Err(failure) => {
                assert!(!enough && failure.error.code == ErrorCode::NoSpace, "{}", failure.error);
                assert_eq!(io.files, before);
            }
        }
    }
    let mut io = MemoryDevices::new(before.clone());
    io.heap = Some(8 << 20);
    assert_eq!(run(&mut io, Options::default()).unwrap_err().error.code, ErrorCode::ScratchTooSmall);
    assert_eq!(io.files, before);
}

/// A block device does not end where the image does, and what is there may be anything.
#[test]
fn a_device_that_keeps_its_length() {
    let (top, base) = pair();
    let root = Spec::new(SIZE, b"").with(data([0, 40, 42], 0x11));
    let base = Spec { name: b"root".to_vec(), ..base };
    let grown = commit_and_verify(&files(&top, &base, Some(&root))).files[&DEVICE_OUTPUT].len();
    for (length, enough) in [(grown, true), (grown - 1, false)] {
        let mut before = files(&top, &base, Some(&root));
        let want = expected(&before);
        before.get_mut(&DEVICE_OUTPUT).unwrap().resize(length, 0x99);
        before.get_mut(&OVERLAY).unwrap().resize(SIZE, 0x99);
        let mut io = MemoryDevices::new(before.clone());
        let fixed = |number: u32| DeviceConfig {
            flags: device_flags::FIXED_LENGTH,
            ..device(number, &before[&number], before[&number].len() as u64)
        };
        io.hold_commit(&fixed(OVERLAY), false, &fixed(DEVICE_OUTPUT));
        let mut source = Qcow::open_source(&mut io, &fixed(OVERLAY)).unwrap();
        let mut sink = Qcow::open_sink(&mut io, &fixed(DEVICE_OUTPUT), true).unwrap();
        let below = Qcow::open_source(&mut io, &device(ANCESTOR, &before[&ANCESTOR], 0)).unwrap();
        let mut below = Ancestors::new(vec![Box::new(below)]);
        let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
        match commit(&mut io, &mut images, Options::default(), &mut |_| {}) {
            Ok(_) => {
                assert!(enough && views(&io.files) == want, "something reads wrong");
                View::new(&io.files[&DEVICE_OUTPUT]).assert_consistent();
                assert_eq!(View::new(&io.files[&OVERLAY]).held(), 0);
                assert_eq!([OVERLAY, DEVICE_OUTPUT].map(|number| io.files[&number].len()), [SIZE, length]);
            }
            Err(failure) => {
                assert!(!enough && failure.error.code == ErrorCode::NoSpace, "{}", failure.error);
                assert_eq!(io.files, before);
            }
        }
    }
}

#[test]
fn io_errors_leave_a_pair_that_can_be_committed() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    let want = expected(&before);
    let total = commit_and_verify(&before).executed();
    for fail_at in 0..total {
        let mut io = MemoryDevices::new(before.clone());
        io.fail_at = Some(fail_at);
        let failure = run(&mut io, Options::default()).unwrap_err();
        assert_eq!(failure.error.errno, 5);
        assert!(views(&io.files).1 == want.1, "request {fail_at}");
        let mut again = MemoryDevices::new(io.files);
        run(&mut again, Options::default()).unwrap();
        assert_finished(&again.files, &want);
    }
}

#[test]
fn dry_runs_and_kept_overlays() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, Options { dry_run: true, ..Options::default() }).unwrap();
    assert_eq!(io.files, before);
    let want = expected(&before);
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, Options { keep_overlay: true, ..Options::default() }).unwrap();
    assert!(views(&io.files) == want && io.files[&OVERLAY] == before[&OVERLAY]);
    let before = files(&Spec::new(SIZE, b"base"), &base, None);
    assert_eq!(commit_and_verify(&before).files, before, "an empty overlay changes nothing");
}
