//! The commit over in-memory qcow images: content, consistency, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_qcow_testkit::{build, crashes, put64, Kit, Spec, State, View, CLUSTER};
use instar_testkit::pair::{built, views, Files};
use instar_testkit::trial::{Done, Trial};
use instar_testkit::{FormatKit, MIDDLE, OVERLAY};

const SIZE: usize = 300 * CLUSTER;

struct Qcow;

impl Trial for Qcow {
    fn kit(&self) -> &dyn FormatKit {
        &Kit
    }

    fn held(&self, overlay: &[u8]) -> u64 {
        View::new(overlay).held() as u64
    }

    fn assert_finished(&self, files: &Files) {
        View::new(&files[&DEVICE_OUTPUT]).assert_whole();
        let top = View::new(&files[&OVERLAY]);
        assert_eq!((top.held(), top.bytes.len()), (0, top.l1.end), "the overlay gives its space back");
    }

    fn assert_instant(&self, _: Done<'_>, now: &Files) {
        for number in [OVERLAY, DEVICE_OUTPUT] {
            View::new(&now[&number]).assert_consistent();
        }
    }

    /// Clusters of tables that nothing refers to yet may lie between others: that is all that is lost.
    fn assert_done_again(&self, done: Done<'_>, again: &Files) {
        let [first, again, done] = [done.before, again, done.after].map(|files| files[&DEVICE_OUTPUT].len());
        assert!(again <= done + (done - first), "{again} bytes, {done} without the crash");
    }
}

fn files(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Files {
    built(build, overlay, backing, ancestor)
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
    Qcow.verify_crashes(&files(&top, &base, None));
    Qcow.verify_crashes(&files(&top, &Spec { tail: 4 * CLUSTER + 9, ..base.clone() }, None));
    let root = Spec::new(SIZE, b"").with(data([0, 1, 2, 3, 299], 0x11)).with(packed([4, 5], 0x12));
    Qcow.verify_crashes(&files(&top, &Spec { name: b"root".to_vec(), ..base }, Some(&root)));
}

/// A cluster of the backing has many of the overlay: what is around the data comes from below, and from streams.
#[test]
fn parts_of_clusters() {
    let top = Spec { cluster_bits: 9, l2_bits: 7, ..Spec::new(SIZE, b"base") };
    let top = top.with(data([0, 5, 8, 9, 10, 33, 599], 0x40)).with(packed([1, 34], 0x41));
    let base = Spec { cluster_bits: 11, ..Spec::new(SIZE, b"root") }.with(packed([2, 8], 0x81)).with(data([149], 0x82));
    let root = Spec::new(SIZE, b"").with(data([0, 1, 2, 3, 4, 5, 298, 299], 0x11));
    Qcow.verify_crashes(&files(&top, &base, Some(&root)));
    Qcow.verify_crashes(&files(&top, &base, Some(&Spec { size: 5 * CLUSTER, clusters: data([4], 0x12), ..root })));
    Qcow.verify_crashes(&files(&top, &Spec { name: Vec::new(), ..base }, None));
}

#[test]
fn tables_of_other_sizes() {
    let (top, base) = pair();
    // A table shorter than a cluster, and one that is longer.
    for (cluster_bits, l2_bits) in [(12, 6), (9, 8)] {
        let base = Spec { cluster_bits, l2_bits, ..base.clone() };
        Qcow.verify_crashes(&files(&Spec { cluster_bits, l2_bits, ..top.clone() }, &base, None));
    }
}

#[test]
fn growth() {
    let (top, base) = pair();
    for size in [64 * CLUSTER, 64 * CLUSTER + 512, 270 * CLUSTER - 512, 299 * CLUSTER] {
        let base = Spec { size, ..base.clone() };
        Qcow.verify_crashes(&files(&top, &base, None));
        let last = size.div_ceil(CLUSTER) - 1;
        // What lies past the end of the disk is not seen when it grows.
        Qcow.verify_crashes(&files(&top, &base.clone().with(data([last], 0x91)), None));
        Qcow.verify_crashes(&files(&top, &base.with(packed([last], 0x91)), None));
    }
    // An overlay that holds nothing.
    let before = files(&Spec::new(SIZE, b"base"), &Spec { size: 100 * CLUSTER + 512, ..base }, None);
    Qcow.verify_crashes(&before);
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
        Qcow.verify_refused(&before, Qcow.options(), ErrorCode::UnsupportedFormat, why);
    }
    // No longer than the backing: that is no reason.
    let root = Spec::new(100 * CLUSTER, b"").with(data([99], 0x11));
    Qcow.verify_crashes(&files(&top, &short, Some(&root)));
}

#[test]
fn several_layers_at_once() {
    let (top, base) = pair();
    let mut before = files(&top, &base, None);
    before.insert(MIDDLE, build(&Spec::new(SIZE, b"base").with(data([1, 5], 0x61)).with(packed([6, 200], 0x62))));
    let overlay = views(&Kit, &before).1;
    let keep = Options { keep_overlay: true, ..Options::default() };
    let io = Qcow.committed(before.clone(), keep);
    assert!(views(&Kit, &io.files) == (overlay.clone(), overlay.clone()));
    let states = crashes().each(&before, &io.log, &mut |files| {
        assert!(views(&Kit, &files).1 == overlay);
        let io = Qcow.committed(files, keep);
        assert!(views(&Kit, &io.files) == (overlay.clone(), overlay.clone()));
    });
    println!("crash states: {states}");
}

#[test]
fn damage_is_found_before_anything_changes() {
    let (top, base) = pair();
    /// Replace the entry at this byte of the first L2 table by one that follows from the table's place.
    fn put(bytes: &mut [u8], at: usize, number: fn(u64) -> u64) {
        let table = View::new(bytes).tables[0].start;
        put64(bytes, table + at, number(table as u64));
    }
    Qcow.verify_damages(
        &files(&top, &base, None),
        &[
            ("is not the start of a cluster", &|bytes| put(bytes, 0, |_| 700)),
            ("past the end of the file", &|bytes| put(bytes, 40, |_| 1 << 40)),
            ("L1 table lie", &|bytes| put(bytes, 40, |_| 1 << 63 | 5 << 53 | 50)),
            ("stream of 0 bytes", &|bytes| put(bytes, 40, |_| 1 << 63 | 5000)),
            ("something else uses", &|bytes| put(bytes, 40, |table| table)),
            ("something else uses", &|bytes| put(bytes, 40, |table| 1 << 63 | 5 << 53 | table)),
            // Two L1 entries.
            ("something else uses", &|bytes| {
                let (l1, table) = (View::new(bytes).l1.start, View::new(bytes).tables[0].start);
                put64(bytes, l1 + 8, table as u64);
            }),
        ],
    );
}

#[test]
fn streams_that_do_not_decode_stop_the_commit() {
    let (top, base) = pair();
    let mut before = files(&top, &base, None);
    let view = View::new(&before[&OVERLAY]);
    let at = (view.entries[&3] & ((1 << 53) - 1)) as usize;
    before.get_mut(&OVERLAY).unwrap()[at..at + 8].fill(0xff);
    let mut io = MemoryDevices::new(before.clone());
    let failure = Qcow.run(&mut io, Options::default()).unwrap_err();
    assert!(failure.error.text.contains("does not decode"), "{}", failure.error);
    assert_eq!(failure.error.code, ErrorCode::ParseFailed);
    assert_eq!(io.files[&OVERLAY], before[&OVERLAY]);
}

#[test]
fn encrypted_images_are_refused() {
    let (top, base) = pair();
    for number in [OVERLAY, DEVICE_OUTPUT] {
        let mut before = files(&top, &base, None);
        before.get_mut(&number).unwrap()[39] = 1;
        Qcow.verify_refused(&before, Options::default(), ErrorCode::LuksUnsupported, "encryption (AES)");
    }
}

#[test]
fn too_little_room_is_found_before_anything_changes() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    Qcow.verify_room(&before, Qcow.commit_and_verify(&before).files[&DEVICE_OUTPUT].len());
}

#[test]
fn a_device_that_keeps_its_length() {
    let (top, base) = pair();
    let root = Spec::new(SIZE, b"").with(data([0, 40, 42], 0x11));
    let before = files(&top, &Spec { name: b"root".to_vec(), ..base }, Some(&root));
    let grown = Qcow.commit_and_verify(&before).files[&DEVICE_OUTPUT].len();
    let after = Qcow.commit_on_devices(&before, [SIZE, grown]).unwrap();
    View::new(&after[&DEVICE_OUTPUT]).assert_consistent();
    assert_eq!(View::new(&after[&OVERLAY]).held(), 0);
    assert_eq!(Qcow.commit_on_devices(&before, [SIZE, grown - 1]), None);
}

#[test]
fn io_errors_leave_a_pair_that_can_be_committed() {
    let (top, base) = pair();
    Qcow.verify_failing_requests(&files(&top, &base, None));
}

#[test]
fn dry_runs_and_kept_overlays() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    assert_eq!(Qcow.verify_dry_and_kept(&before)[&OVERLAY], before[&OVERLAY]);
    let before = files(&Spec::new(SIZE, b"base"), &base, None);
    assert_eq!(Qcow.commit_and_verify(&before).files, before, "an empty overlay changes nothing");
}
