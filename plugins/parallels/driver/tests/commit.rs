//! The commit over in-memory Parallels images: content, consistency, what the header says, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::Change;
use instar_parallels_testkit::{build, le32, put32, section, Kit, Spec, View, CLOSED, CLUSTER, OPEN};
use instar_testkit::pair::{built, views, Files};
use instar_testkit::trial::{Done, Trial};
use instar_testkit::{FormatKit, ImageKit, MIDDLE, OVERLAY};

const SIZE: usize = 300 * CLUSTER;

struct Parallels;

impl Trial for Parallels {
    fn kit(&self) -> &dyn FormatKit {
        &Kit
    }

    /// In pieces of a power of two, which are what the image is said to have as clusters, and only those of the disk.
    fn held(&self, overlay: &[u8]) -> u64 {
        let view = View::new(overlay);
        let unit = 1 << view.cluster.trailing_zeros();
        let rest = view.places.keys().map(|cluster| view.size.saturating_sub(cluster * view.cluster));
        let held = rest.map(|rest| rest.min(view.cluster).div_ceil(unit)).sum::<usize>() as u64;
        assert!(held <= view.size.div_ceil(unit) as u64);
        held
    }

    fn assert_finished(&self, files: &Files) {
        View::new(&files[&DEVICE_OUTPUT]).assert_consistent();
        let top = View::new(&files[&OVERLAY]);
        top.assert_closed();
        assert_eq!((top.held(), top.bytes.len()), (0, top.data.max(top.cluster)), "the overlay gives its space back");
    }

    fn assert_done(&self, Done { before, after }: Done<'_>) {
        if after[&DEVICE_OUTPUT] != before[&DEVICE_OUTPUT] {
            View::new(&after[&DEVICE_OUTPUT]).assert_closed();
        }
    }

    fn assert_instant(&self, Done { before, after }: Done<'_>, now: &Files) {
        for number in [OVERLAY, DEVICE_OUTPUT] {
            let (is, was) = (&now[&number], &before[&number]);
            let view = View::new(is);
            view.assert_consistent();
            // Its next user sees that a change was under way, and no bitmap says that nothing was.
            let touched = is[..view.bat_end] != was[..View::new(was).bat_end] || is.len() != was.len();
            // A second run that lost power as well may have taken other clusters than the first.
            let settled = *is == after[&number] || Kit.content(is, None) == Kit.content(&after[&number], None);
            assert!(!touched || settled || view.is_open(), "{number} changes, and does not say so");
            assert!(!view.has_extension() || is[..64] == was[..64], "{number} has an extension that is out of date");
        }
    }

    /// A run that found nothing to write, as the first one had written it all, need not have opened the image.
    fn assert_done_again(&self, done: Done<'_>, again: &Files) {
        let [again, done] = [again, done.after].map(|files| files[&DEVICE_OUTPUT].len());
        assert!(again <= done, "the second run has lost space");
    }
}

fn files(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Files {
    built(build, overlay, backing, ancestor)
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
    Parallels.verify_crashes(&files(&top, &base, None));
    Parallels.verify_crashes(&files(&top, &Spec { tail: 4 * CLUSTER + 9, ..base.clone().newer() }, None));
    Parallels.verify_crashes(&files(&top, &Spec { gaps: vec![0, 2], says_where: true, room: 3, ..base.clone() }, None));
    let root = Spec::new(SIZE).with(data([0, 1, 2, 3, 299], 0x11));
    Parallels.verify_crashes(&files(&top, &base, Some(&root)));
}

/// A cluster of the backing has several of the overlay, or parts of them: what is around the data comes from below.
#[test]
fn parts_of_clusters() {
    let top = Spec::new(SIZE).of_tracks(1).newer().with(data([0, 5, 8, 9, 10, 33, 599], 0x40));
    let root = Spec::new(SIZE).newer().with(data([0, 1, 2, 3, 4, 5, 298, 299], 0x11));
    for tracks in [3, 4, 63] {
        let base = Spec::new(SIZE).of_tracks(tracks).with(data([0, 9], 0x82));
        Parallels.verify_crashes(&files(&top, &base, Some(&root)));
        Parallels.verify_crashes(&files(
            &top,
            &base.clone().newer(),
            Some(&Spec::new(5 * CLUSTER).with(data([4], 0x12))),
        ));
        Parallels.verify_crashes(&files(&Spec::new(SIZE).of_tracks(7).with(data([1, 2, 85], 0x41)), &base, None));
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
        Parallels.verify_crashes(&before);
        let done = Parallels.commit_and_verify(&before);
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
    Parallels.verify_crashes(&files(&top, &empty, None));
    let done = Parallels.commit_and_verify(&files(&top, &empty, None));
    assert_eq!(le32(&done.files[&DEVICE_OUTPUT], 52), 0);
}

#[test]
fn growth() {
    let (top, base) = pair();
    for size in [64 * CLUSTER, 64 * CLUSTER + 512, 270 * CLUSTER - 512, 299 * CLUSTER] {
        let base = Spec { size, entries: size.div_ceil(CLUSTER), ..base.clone() };
        Parallels.verify_crashes(&files(&top, &base, None));
        // What lies past the end of the disk is not seen when it grows.
        let last = size.div_ceil(CLUSTER) - 1;
        let base = base.with(data([last], 0x91));
        Parallels.verify_crashes(&files(&top, &base, None));
        Parallels.verify_crashes(&files(&top, &Spec { tail: 5 * CLUSTER, ..base.clone().newer() }, None));
        Parallels.verify_crashes(&files(&top, &Spec { room: 9, says_where: true, ..base }, None));
    }
    // Entries that are there already, and clusters of an odd size.
    Parallels.verify_crashes(&files(&top, &Spec { size: 100 * CLUSTER, ..base.clone() }, None));
    let odd = Spec::new(90 * 1536 + 512).of_tracks(3).with(data([0, 1, 90], 0x77));
    Parallels.verify_crashes(&files(&top, &odd, None));
    Parallels.verify_crashes(&files(&top, &odd.newer(), None));
    // An overlay that holds nothing.
    let small = Spec { size: 100 * CLUSTER + 512, entries: 101, ..base };
    Parallels.verify_crashes(&files(&Spec::new(SIZE), &small, None));
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
        Parallels.verify_refused(&before, Parallels.options(), ErrorCode::UnsupportedFormat, why);
    }
}

#[test]
fn two_layers_at_once() {
    let (top, base) = pair();
    let middle = Spec::new(SIZE).of_tracks(3).with(data([0, 1, 3, 199], 0x31));
    let mut before = files(&top, &base, Some(&Spec::new(SIZE).with(data([0, 3, 4, 299], 0x11))));
    before.insert(MIDDLE, build(&middle));
    let kept = Parallels.verify_dry_and_kept(&before);
    View::new(&kept[&DEVICE_OUTPUT]).assert_closed();
    assert!([OVERLAY, MIDDLE].iter().all(|number| kept[number] == before[number]));
}

#[test]
fn a_smaller_overlay_leaves_the_rest() {
    let top = Spec::new(10 * CLUSTER + 512).with(data([3, 10], 0x40));
    let base = Spec::new(SIZE).with(data([11], 0x80));
    let root = Spec::new(11 * CLUSTER).with(data([10], 0x11));
    Parallels.verify_crashes(&files(&top, &base, Some(&root)));
    Parallels.commit_and_verify(&files(&top, &base.with(data([10], 0x81)), None));
}

#[test]
fn damage_is_found_before_anything_changes() {
    let (top, base) = pair();
    let good = files(&top, &base, None);
    Parallels.verify_damages(
        &good,
        &[
            ("past the end of the file", &|bytes| put32(bytes, 64 + 40, 1_000_003)),
            ("entry 4294967295 names", &|bytes| put32(bytes, 64 + 40, u32::MAX)),
            ("past the end of the file", &|bytes| bytes.truncate(bytes.len() - 1)),
            ("in front of the data", &|bytes| put32(bytes, 64 + 40, 1)),
            ("in the same place", &|bytes| bytes.copy_within(68..72, 64 + 40)),
            ("flags say that the image is empty", &|bytes| put32(bytes, 52, 1)),
            ("the BAT has 20 entries", &|bytes| put32(bytes, 32, 20)),
            ("in_use is 0x5", &|bytes| put32(bytes, 44, 5)),
        ],
    );
    // Entries that count sectors may name the middle of a cluster.
    let mut damaged = good;
    let bytes = damaged.get_mut(&DEVICE_OUTPUT).unwrap();
    let entry = le32(bytes, 64 + 4);
    put32(bytes, 64 + 40, entry + 1);
    let (options, code) = (Options::default(), ErrorCode::BackingCorrupt);
    Parallels.verify_refused(&damaged, options, code, "not the start of a cluster");
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
    let want = views(&Kit, &files(&odd, &base, None));
    let kept = Parallels.committed(before.clone(), Options { keep_overlay: true, ..Options::default() });
    assert!(
        views(&Kit, &[(OVERLAY, build(&odd)), (DEVICE_OUTPUT, kept.files[&DEVICE_OUTPUT].clone())].into()).0 == want.1
    );
    let backing = before.remove(&OVERLAY).unwrap();
    let (options, code) = (Options::default(), ErrorCode::UnsupportedFormat);
    let before = [(OVERLAY, build(&top)), (DEVICE_OUTPUT, backing)].into();
    Parallels.verify_refused(&before, options, code, "not the start of a cluster");
}

#[test]
fn too_little_room_is_found_before_anything_changes() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    Parallels.verify_room(&before, Parallels.commit_and_verify(&before).files[&DEVICE_OUTPUT].len());
}

#[test]
fn a_device_that_keeps_its_length() {
    let (top, base) = pair();
    let before = files(&top, &base, Some(&Spec::new(SIZE).with(data([0, 40, 42], 0x11))));
    let grown = Parallels.commit_and_verify(&before).files[&DEVICE_OUTPUT].len();
    let after = Parallels.commit_on_devices(&before, [SIZE, grown]).unwrap();
    View::new(&after[&DEVICE_OUTPUT]).assert_closed();
    assert_eq!(View::new(&after[&OVERLAY]).held(), 0);
    assert_eq!(Parallels.commit_on_devices(&before, [SIZE, grown - 1]), None);
}

#[test]
fn io_errors_leave_a_pair_that_can_be_committed() {
    let (top, base) = pair();
    Parallels.verify_failing_requests(&files(&top, &base, None));
}

#[test]
fn dry_runs_and_kept_overlays() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    assert_eq!(Parallels.verify_dry_and_kept(&before)[&OVERLAY], before[&OVERLAY]);
    let before = files(&Spec { flags: 1, ..Spec::new(SIZE) }, &base, None);
    assert_eq!(Parallels.commit_and_verify(&before).files, before, "an empty overlay changes nothing");
}
