//! The commit over in-memory Parallels images: content, consistency, what the header says, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::FormatDriver;
use instar_guest_view::Ancestors;
use instar_parallels_driver::Parallels;
use instar_parallels_testkit::pair::{files, views, Files, ANCESTOR, MIDDLE, OVERLAY};
use instar_parallels_testkit::{build, crashes, device, le32, put32, section, Spec, View, CLOSED, CLUSTER, OPEN};
use std::collections::BTreeSet;

const GROW: Options = Options { keep_overlay: false, dry_run: false, resize_backing: true };
const SIZE: usize = 300 * CLUSTER;

fn run(io: &mut MemoryDevices, options: Options) -> Result<Outcome, CommitFailure> {
    instar_parallels_testkit::pair::run(io, options, i64::MAX as u64)
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
    View::new(&files[&DEVICE_OUTPUT]).assert_consistent();
    let top = View::new(&files[&OVERLAY]);
    top.assert_closed();
    assert_eq!((top.held(), top.bytes.len()), (0, top.data.max(top.cluster)), "the overlay gives its space back");
}

fn commit_and_verify(files: &Files) -> MemoryDevices {
    let want = expected(files);
    let view = View::new(&files[&OVERLAY]);
    // In pieces of a power of two, which are what the image is said to have as clusters, and only those of the disk.
    let unit = 1 << view.cluster.trailing_zeros();
    let rest = view.places.keys().map(|cluster| view.size.saturating_sub(cluster * view.cluster));
    let held = rest.map(|rest| rest.min(view.cluster).div_ceil(unit)).sum::<usize>() as u64;
    assert!(held <= view.size.div_ceil(unit) as u64);
    let mut io = MemoryDevices::new(files.clone());
    let outcome = run(&mut io, GROW).unwrap();
    assert_eq!((outcome.clusters_committed, outcome.overlay_clusters_cleared), (held, held));
    assert_finished(&io.files, &want);
    assert_eq!(io.unflushed(), BTreeSet::new());
    if io.files[&DEVICE_OUTPUT] != files[&DEVICE_OUTPUT] {
        View::new(&io.files[&DEVICE_OUTPUT]).assert_closed();
    }
    io
}

fn verify_crashes(before: &Files) {
    let want = expected(before);
    let done = commit_and_verify(before);
    let states = crashes().each(before, &done.log, &mut |files| {
        assert!(views(&files).1 == want.1, "the overlay changed its content");
        for number in [OVERLAY, DEVICE_OUTPUT] {
            let (is, was) = (&files[&number], &before[&number]);
            let view = View::new(is);
            view.assert_consistent();
            // Whoever opens it knows that something was under way, and no bitmap says that nothing was.
            let touched = is[..view.bat_end] != was[..View::new(was).bat_end] || is.len() != was.len();
            let settled = *is == done.files[&number];
            assert!(!touched || settled || view.is_open(), "{number} changes, and does not say so");
            assert!(!view.has_extension() || is[..64] == was[..64], "{number} has an extension that is out of date");
        }
        let mut io = MemoryDevices::new(files);
        run(&mut io, GROW).unwrap();
        assert_finished(&io.files, &want);
        // A run that found nothing to write, as the first one had written it all, need not have opened the image.
        let base = View::new(&io.files[&DEVICE_OUTPUT]);
        assert!(base.bytes.len() <= done.files[&DEVICE_OUTPUT].len(), "the second run has lost space");
    });
    assert!(states > 1);
    println!("crash states: {states}");
}

fn data(clusters: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, u8)> {
    clusters.into_iter().map(|cluster| (cluster, seed)).collect()
}

fn pair() -> (Spec, Spec) {
    (Spec::new(SIZE).newer().with(data([0, 1, 2, 9, 200, 299], 0x40)), Spec::new(SIZE).with(data([1, 9, 30], 0x80)))
}

#[test]
fn data_over_everything() {
    let (top, base) = pair();
    verify_crashes(&files(&top, &base, None));
    verify_crashes(&files(&top, &Spec { tail: 4 * CLUSTER + 9, ..base.clone().newer() }, None));
    verify_crashes(&files(&top, &Spec { gaps: vec![0, 2], says_where: true, room: 3, ..base.clone() }, None));
    let root = Spec::new(SIZE).with(data([0, 1, 2, 3, 299], 0x11));
    verify_crashes(&files(&top, &base, Some(&root)));
}

/// A cluster of the backing has several of the overlay, or parts of them: what is around the data comes from below.
#[test]
fn parts_of_clusters() {
    let top = Spec::new(SIZE).of_tracks(1).newer().with(data([0, 5, 8, 9, 10, 33, 599], 0x40));
    let root = Spec::new(SIZE).newer().with(data([0, 1, 2, 3, 4, 5, 298, 299], 0x11));
    for tracks in [3, 4, 63] {
        let base = Spec::new(SIZE).of_tracks(tracks).with(data([0, 9], 0x82));
        verify_crashes(&files(&top, &base, Some(&root)));
        verify_crashes(&files(&top, &base.clone().newer(), Some(&Spec::new(5 * CLUSTER).with(data([4], 0x12)))));
        verify_crashes(&files(&Spec::new(SIZE).of_tracks(7).with(data([1, 2, 85], 0x41)), &base, None));
    }
}

/// Bits that say something of the content, or that there is none, go with the first change, and `in_use` comes.
#[test]
fn what_the_header_says() {
    let (top, base) = pair();
    let bitmap = Some(vec![section(0x2038_5fae_252c_b34a, 0, &[0; 32])]);
    for (in_use, after) in [(CLOSED, CLOSED), (OPEN, CLOSED), (0, 0)] {
        let (top, base) = (Spec { in_use, ..top.clone() }, Spec { in_use, sections: bitmap.clone(), ..base.clone() });
        let before = files(&top, &base, None);
        verify_crashes(&before);
        let done = commit_and_verify(&before);
        assert_eq!([OVERLAY, DEVICE_OUTPUT].map(|number| le32(&done.files[&number], 44)), [after; 2]);
        // The mark is durable before anything else of the image changes, and goes when everything else is.
        for number in [OVERLAY, DEVICE_OUTPUT] {
            let log: Vec<&Change> = done.log.iter().filter(|change| change.device() == number).collect();
            let flush = |change: &Change| matches!(change, Change::Flush { .. });
            assert!(in_use == OPEN && number == OVERLAY || flush(log[1]), "{:?}", log[1]);
            assert!(flush(log[log.len() - 1]) && flush(log[log.len() - 3]));
        }
    }
    let empty = Spec { flags: 1, clusters: Vec::new(), sections: bitmap, ..base };
    verify_crashes(&files(&top, &empty, None));
    let done = commit_and_verify(&files(&top, &empty, None));
    assert_eq!(le32(&done.files[&DEVICE_OUTPUT], 52), 0);
}

#[test]
fn growth() {
    let (top, base) = pair();
    for size in [64 * CLUSTER, 64 * CLUSTER + 512, 270 * CLUSTER - 512, 299 * CLUSTER] {
        let base = Spec { size, entries: size.div_ceil(CLUSTER), ..base.clone() };
        verify_crashes(&files(&top, &base, None));
        // What lies past the end of the disk is not seen when it grows.
        let last = size.div_ceil(CLUSTER) - 1;
        let base = base.with(data([last], 0x91));
        verify_crashes(&files(&top, &base, None));
        verify_crashes(&files(&top, &Spec { tail: 5 * CLUSTER, ..base.clone().newer() }, None));
        verify_crashes(&files(&top, &Spec { room: 9, says_where: true, ..base }, None));
    }
    // Entries that are there already, and clusters of an odd size.
    verify_crashes(&files(&top, &Spec { size: 100 * CLUSTER, ..base.clone() }, None));
    let odd = Spec::new(90 * 1536 + 512).of_tracks(3).with(data([0, 1, 90], 0x77));
    verify_crashes(&files(&top, &odd, None));
    verify_crashes(&files(&top, &odd.newer(), None));
    // An overlay that holds nothing.
    let small = Spec { size: 100 * CLUSTER + 512, entries: 101, ..base };
    verify_crashes(&files(&Spec::new(SIZE), &small, None));
}

#[test]
fn what_cannot_grow_says_why() {
    let (top, base) = pair();
    let longer = Spec::new(150 * CLUSTER).with(data([149], 0x11));
    let small = Spec { size: 100 * CLUSTER, entries: 100, ..base };
    let beyond = Spec { entries: 200, ..small.clone() }.with(data([150], 0x12));
    for (before, why) in [
        (files(&top, &small, Some(&longer)), "what lies below it is longer"),
        (files(&top, &beyond, None), "1 clusters past the end of the disk"),
    ] {
        let mut io = MemoryDevices::new(before.clone());
        let failure = run(&mut io, GROW).unwrap_err();
        assert!(failure.error.text.contains(why), "{}", failure.error);
        assert_eq!(io.files, before);
    }
}

#[test]
fn two_layers_at_once() {
    let (top, base) = pair();
    let middle = Spec::new(SIZE).of_tracks(3).with(data([0, 1, 3, 199], 0x31));
    let mut before = files(&top, &base, Some(&Spec::new(SIZE).with(data([0, 3, 4, 299], 0x11))));
    before.insert(MIDDLE, build(&middle));
    let want = expected(&before);
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, Options { keep_overlay: true, ..Options::default() }).unwrap();
    assert!(views(&io.files) == want);
    View::new(&io.files[&DEVICE_OUTPUT]).assert_closed();
    assert!([OVERLAY, MIDDLE].iter().all(|number| io.files[number] == before[number]));
}

#[test]
fn a_smaller_overlay_leaves_the_rest() {
    let top = Spec::new(10 * CLUSTER + 512).with(data([3, 10], 0x40));
    let base = Spec::new(SIZE).with(data([11], 0x80));
    let root = Spec::new(11 * CLUSTER).with(data([10], 0x11));
    verify_crashes(&files(&top, &base, Some(&root)));
    commit_and_verify(&files(&top, &base.with(data([10], 0x81)), None));
}

#[test]
fn damage_is_found_before_anything_changes() {
    let (top, base) = pair();
    let good = files(&top, &base, None);
    type Damage = (&'static str, fn(&mut Vec<u8>));
    let damages: [Damage; 8] = [
        ("past the end of the file", |bytes| put32(bytes, 64 + 40, 1_000_003)),
        ("entry 4294967295 names", |bytes| put32(bytes, 64 + 40, u32::MAX)),
        ("past the end of the file", |bytes| bytes.truncate(bytes.len() - 1)),
        ("in front of the data", |bytes| put32(bytes, 64 + 40, 1)),
        ("in the same place", |bytes| bytes.copy_within(68..72, 64 + 40)),
        ("flags say that the image is empty", |bytes| put32(bytes, 52, 1)),
        ("the BAT has 20 entries", |bytes| put32(bytes, 32, 20)),
        ("in_use is 0x5", |bytes| put32(bytes, 44, 5)),
    ];
    for number in [OVERLAY, DEVICE_OUTPUT] {
        for (why, damage) in &damages {
            let mut damaged = good.clone();
            damage(damaged.get_mut(&number).unwrap());
            let mut io = MemoryDevices::new(damaged.clone());
            let failure = run(&mut io, Options::default()).unwrap_err();
            let code = if number == OVERLAY { ErrorCode::OverlayCorrupt } else { ErrorCode::BackingCorrupt };
            assert_eq!(failure.error.code, code, "{why}: {}", failure.error);
            assert!(failure.error.text.contains(why), "{why}: {}", failure.error);
            assert_eq!(io.files, damaged, "{why}");
        }
    }
    // Entries that count sectors may name the middle of a cluster.
    let mut damaged = good;
    let bytes = damaged.get_mut(&DEVICE_OUTPUT).unwrap();
    let entry = le32(bytes, 64 + 4);
    put32(bytes, 64 + 40, entry + 1);
    let failure = run(&mut MemoryDevices::new(damaged), Options::default()).unwrap_err();
    assert!(failure.error.text.contains("not the start of a cluster"), "{}", failure.error);
}

/// QEMU leaves images so whose clusters are no power of two.
#[test]
fn data_that_begins_within_a_cluster_is_only_read() {
    let (top, base) = pair();
    let odd = Spec::new(SIZE).of_tracks(3).newer().with(data([0, 7], 0x51));
    let mut before = files(&odd, &base, None);
    let bytes = before.get_mut(&OVERLAY).unwrap();
    let start = le32(bytes, 48);
    put32(bytes, 48, start + 1);
    let want = views(&files(&odd, &base, None));
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, Options { keep_overlay: true, ..Options::default() }).unwrap();
    assert!(views(&[(OVERLAY, build(&odd)), (DEVICE_OUTPUT, io.files[&DEVICE_OUTPUT].clone())].into()).0 == want.1);
    let backing = before.remove(&OVERLAY).unwrap();
    let mut io = MemoryDevices::new([(OVERLAY, build(&top)), (DEVICE_OUTPUT, backing)]);
    let failure = run(&mut io, Options::default()).unwrap_err();
    assert!(failure.error.text.contains("not the start of a cluster") && io.log.is_empty(), "{}", failure.error);
}

#[test]
fn too_little_room_is_found_before_anything_changes() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    let after = commit_and_verify(&before).files[&DEVICE_OUTPUT].len() as u64;
    for (length, enough) in [(after, true), (after - 1, false)] {
        let mut io = MemoryDevices::new(before.clone());
        match instar_parallels_testkit::pair::run(&mut io, Options::default(), length) {
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
    let root = Spec::new(SIZE).with(data([0, 40, 42], 0x11));
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
        let mut source = Parallels::open_source(&mut io, &fixed(OVERLAY)).unwrap();
        let mut sink = Parallels::open_sink(&mut io, &fixed(DEVICE_OUTPUT), true).unwrap();
        let below = Parallels::open_source(&mut io, &device(ANCESTOR, &before[&ANCESTOR], 0)).unwrap();
        let mut below = Ancestors::new(vec![Box::new(below)]);
        let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
        match commit(&mut io, &mut images, Options::default(), &mut |_| {}) {
            Ok(_) => {
                assert!(enough && views(&io.files) == want, "something reads wrong");
                View::new(&io.files[&DEVICE_OUTPUT]).assert_closed();
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
    let before = files(&Spec { flags: 1, ..Spec::new(SIZE) }, &base, None);
    assert_eq!(commit_and_verify(&before).files, before, "an empty overlay changes nothing");
}
