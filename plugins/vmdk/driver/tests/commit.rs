//! The commit over in-memory vmdk images: content, consistency, both copies of the tables, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_testkit::pair::expected;
use instar_testkit::trial::{Done, Trial};
use instar_testkit::FormatKit;
use instar_vmdk_format::next_content_id;
use instar_vmdk_testkit::pair::{assert_goes_with_none_but, files, views, Files, OVERLAY};
use instar_vmdk_testkit::{build, fill, le32, put32, Kit, Spec, State, View, GRAIN};

struct Vmdk;

impl Trial for Vmdk {
    fn kit(&self) -> &dyn FormatKit {
        &Kit
    }

    fn options(&self) -> Options {
        Options::default()
    }

    fn held(&self, overlay: &[u8]) -> u64 {
        View::new(overlay).held() as u64
    }

    fn assert_finished(&self, files: &Files) {
        let (top, base) = (View::new(&files[&OVERLAY]), View::new(&files[&DEVICE_OUTPUT]));
        for view in [&top, &base] {
            view.assert_consistent();
            assert!(view.entries.iter().all(|copy| *copy == view.entries[0]), "the copies of the tables differ");
        }
        assert_eq!(top.held(), 0);
        assert_eq!((top.parent(), top.announced()), (base.cid(), false));
    }

    fn assert_done(&self, Done { before, after }: Done<'_>) {
        assert!(after[&OVERLAY].len() <= before[&OVERLAY].len(), "the overlay grew");
        let [was, is] = [before, after].map(|files| View::new(&files[&DEVICE_OUTPUT]).cid());
        assert_eq!(is != was, View::new(&before[&OVERLAY]).held() > 0);
    }

    fn assert_instant(&self, Done { before, .. }: Done<'_>, now: &Files) {
        for number in [OVERLAY, DEVICE_OUTPUT] {
            View::new(&now[&number]).assert_consistent();
        }
        assert_goes_with_none_but(now, before, &views(before).1);
    }
}

fn data(grains: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    grains.into_iter().map(|grain| (grain, State::Data(seed))).collect()
}

const SIZE: usize = 1200 * GRAIN;

fn pair() -> (Spec, Spec) {
    (
        Spec::new(SIZE, 7, 5).with(data([0, 1, 2, 9, 600, 1199], 0x40)),
        Spec::new(SIZE, 5, u32::MAX).with(data([1, 9, 30], 0x80)),
    )
}

#[test]
fn data_over_everything() {
    let (top, base) = pair();
    for redundant in [false, true] {
        for lazy_tables in [false, true] {
            let top = Spec { redundant, ..top.clone() };
            let base = Spec { redundant, lazy_tables, ..base.clone() };
            Vmdk.verify_crashes(&files(&top, &base, None));
            Vmdk.commit_and_verify(&files(&Spec { lazy_tables, ..top }, &base, None));
        }
    }
}

#[test]
fn zeroed_grains_on_either_side() {
    let top = Spec::new(SIZE - 512, 7, 5).with([
        (0, State::Zero),
        (1, State::Zero),
        (2, State::Data(3)),
        (1199, State::Zero),
    ]);
    let base = Spec::new(SIZE - 512, 5, u32::MAX).with(data([1, 1199], 0x80));
    let root = Spec::new(SIZE, 4, u32::MAX).with(data([0, 1, 2, 3, 1199], 0x11));
    for (zeroed, lazy_tables) in [(false, true), (true, false), (true, true)] {
        let base = Spec { zeroed, lazy_tables, parent: 4, ..base.clone() };
        Vmdk.verify_crashes(&files(&top, &base, Some(&root)));
        Vmdk.verify_crashes(&files(&top, &base, None));
    }
    for zeroed in [false, true] {
        let base = Spec { zeroed, parent: 4, ..base.clone() }.with([(0, State::Zero), (2, State::Zero)]);
        Vmdk.verify_crashes(&files(&top, &base, Some(&root)));
    }
}

#[test]
fn compressed_grains_also_with_a_directory_at_the_end() {
    let (top, base) = pair();
    for footer in [false, true] {
        let top = Spec { compressed: true, redundant: !footer, footer, ..top.clone() };
        Vmdk.verify_crashes(&files(&top, &base, None));
    }
}

#[test]
fn a_smaller_overlay_leaves_the_rest() {
    let top = Spec::new(10 * GRAIN + 512, 7, 5).with(data([3, 10], 0x40));
    let base = Spec::new(SIZE, 5, 4).with(data([11], 0x80));
    let root = Spec::new(11 * GRAIN, 4, u32::MAX).with(data([10], 0x11));
    Vmdk.verify_crashes(&files(&top, &base, Some(&root)));
    Vmdk.commit_and_verify(&files(&top, &base.with(data([10], 0x81)), None));
}

#[test]
fn content_ids_of_any_length() {
    for cid in [0, 1, 0xabc, 0x0123_4567, u32::MAX - 1] {
        let (top, base) = pair();
        let before = files(&Spec { parent: cid, ..top }, &Spec { cid, ..base }, None);
        let child = Some(View::new(&before[&OVERLAY]).cid());
        assert_eq!(
            View::new(&Vmdk.commit_and_verify(&before).files[&DEVICE_OUTPUT]).cid(),
            next_content_id(cid, child)
        );
    }
}

#[test]
fn an_empty_overlay_changes_nothing() {
    let before = files(&Spec::new(SIZE, 7, 5), &pair().1, None);
    assert_eq!(Vmdk.commit_and_verify(&before).files, before);
}

#[test]
fn what_an_interrupted_run_left_is_taken_back() {
    // All entries are gone, in one copy at least; the grains are still there.
    let (top, base) = pair();
    let mut before = files(&top, &base, None);
    let overlay = before.get_mut(&OVERLAY).unwrap();
    let directory = instar_vmdk_testkit::le64(overlay, 56) as usize * 512;
    for table in 0..3 {
        let at = le32(overlay, directory + table * 4) * 512;
        overlay[at..at + 2048].fill(0);
    }
    let length = overlay.len();
    let want = expected(&Kit, &before);
    let io = Vmdk.committed(before, Options::default());
    Vmdk.verify_finished(&io.files, &want);
    assert!(io.files[&OVERLAY].len() + 6 * GRAIN <= length);
}

#[test]
fn damage_is_found_before_anything_changes() {
    let (top, base) = pair();
    fn directory(bytes: &[u8]) -> usize {
        instar_vmdk_testkit::le64(bytes, 56) as usize * 512
    }
    fn table(bytes: &[u8]) -> usize {
        le32(bytes, directory(bytes)) * 512
    }
    /// Replace the entry at this byte of the first table by one that follows from the table's sector.
    fn put(bytes: &mut [u8], at: usize, entry: fn(usize) -> usize) {
        let table = table(bytes);
        put32(bytes, table + at, entry(table / 512));
    }
    Vmdk.verify_damages(
        &files(&top, &base, None),
        &[
            ("past the end of the file", &|bytes| put(bytes, 4, |_| 1 << 30)),
            // The header, the table itself, and another grain.
            ("overlaps metadata or another grain", &|bytes| put(bytes, 4, |_| 1)),
            ("overlaps metadata or another grain", &|bytes| put(bytes, 4, |table| table)),
            ("overlaps metadata or another grain", &|bytes| {
                let (table, first) = (table(bytes), le32(bytes, table(bytes) + 4));
                put32(bytes, table + 8, first + 1);
            }),
            ("past the end of the file", &|bytes| {
                let directory = directory(bytes);
                put32(bytes, directory, 1 << 30);
            }),
            ("overlaps other metadata", &|bytes| {
                let (directory, table) = (directory(bytes), table(bytes));
                put32(bytes, directory + 4, table / 512);
            }),
            ("past the end of the file", &|bytes| put32(bytes, 56, 1 << 30)),
        ],
    );
    // So is a stream that does not decode, of an image with no more grains than are decoded first.
    let mut damaged = files(&Spec { compressed: true, ..top }, &base, None);
    let bytes = damaged.get_mut(&OVERLAY).unwrap();
    let at = le32(bytes, table(bytes) + 8) * 512;
    bytes[at + 20] ^= 0xff;
    Vmdk.verify_refused(&damaged, Options::default(), ErrorCode::ParseFailed, "");
}

/// Of an image with more grains than are decoded first, one that does not decode is found while writing: the overlay is as
/// it was.
#[test]
fn a_stream_of_a_large_image_that_does_not_decode_is_found_later() {
    let grains = data(0..1100, 0x21);
    let top = Spec { compressed: true, redundant: false, ..Spec::new(1100 * GRAIN, 7, 5) }.with(grains);
    let base = Spec::new(1100 * GRAIN, 5, u32::MAX).with(data([1099], 0x43));
    let mut damaged = files(&top, &base, None);
    let want = views(&damaged).0;
    let bytes = damaged.get_mut(&OVERLAY).unwrap();
    let table = le32(bytes, instar_vmdk_testkit::le64(bytes, 56) as usize * 512) * 512;
    let at = le32(bytes, table + 8) * 512;
    bytes[at + 20] ^= 0xff;
    let overlay = bytes.clone();
    let mut io = MemoryDevices::new(damaged);
    assert_eq!(Vmdk.run(&mut io, Options::default()).unwrap_err().error.code, ErrorCode::ParseFailed);
    assert_eq!(View::new(&io.files[&OVERLAY]).entries, View::new(&overlay).entries);
    assert!(View::new(&io.files[&DEVICE_OUTPUT]).content(&[]) == want, "the backing reads something else");
}

/// What a commit adds begins behind the last grain, which may begin anywhere and be cut short.
#[test]
fn a_last_grain_that_goes_on_behind_the_end_is_not_written_over() {
    let overlay = Spec::new(40 * GRAIN, 7, 5).with(data([0, 1, 2], 0x21));
    let backing = Spec { redundant: false, ..Spec::new(40 * GRAIN, 5, u32::MAX) }.with(data([9], 0x43));
    for (shift, cut, allowed) in [(0, 0, true), (0, 512, true), (1, 0, true), (1, 512, false), (1, 1024, false)] {
        let mut files = files(&overlay, &backing, None);
        let base = files.get_mut(&DEVICE_OUTPUT).unwrap();
        let table = le32(base, le32(base, 56) * 512) * 512;
        let sector = le32(base, table + 9 * 4) + shift;
        put32(base, table + 9 * 4, sector);
        base.resize((sector * 512 + GRAIN - cut).max(sector * 512 + 1), 0x99);
        let before = files.clone();
        let mut io = MemoryDevices::new(files);
        match Vmdk.run(&mut io, Options::default()) {
            Ok(_) => {
                let (wanted, now) = (expected(&Kit, &before), views(&io.files));
                assert!(allowed && now.0 == wanted.0 && now.1 == wanted.1, "{shift} {cut}: something reads wrong");
            }
            Err(failure) => {
                assert!(!allowed, "{shift} {cut}: {}", failure.error);
                assert_eq!(failure.error.code, ErrorCode::BackingCorrupt);
                assert!(failure.error.text.contains("past the end of the file"), "{}", failure.error.text);
                assert_eq!(io.log, vec![]);
            }
        }
    }
}

#[test]
fn too_little_memory_is_found_before_anything_changes() {
    let (top, base) = pair();
    // Decoding takes as much as a grain says, which may be more than there is.
    let large = |bytes: &mut Vec<u8>| put32(bytes, 20, 1 << 17);
    for (heap, compressed) in [(20 << 20, false), (48 << 20, true), (13 << 20, true)] {
        let mut before = files(&Spec { compressed, ..top.clone() }, &base, None);
        if compressed {
            large(before.get_mut(&OVERLAY).unwrap());
        }
        let mut io = MemoryDevices::new(before.clone());
        io.heap = Some(heap);
        let result = Vmdk.run(&mut io, Options::default());
        Vmdk.verify_refusal(result, &io, &before, ErrorCode::ScratchTooSmall, "");
    }
}

#[test]
fn io_errors_leave_a_pair_that_can_be_committed() {
    let (top, base) = pair();
    Vmdk.verify_failing_requests(&files(&top, &Spec { lazy_tables: true, ..base }, None));
}

#[test]
fn dry_runs_and_kept_overlays() {
    let (top, base) = pair();
    let kept = Vmdk.verify_dry_and_kept(&files(&top, &base, None));
    let top = View::new(&kept[&OVERLAY]);
    assert_eq!((top.held(), top.parent()), (6, View::new(&kept[&DEVICE_OUTPUT]).cid()));
}

#[test]
fn the_builder_and_the_view_agree() {
    let bytes = build(&pair().0);
    let content = View::new(&bytes).content(&[]);
    assert_eq!(content[9 * GRAIN..10 * GRAIN], fill(9, 0x40));
}

/// Nothing that it could record says that it has a parent now.
#[test]
fn an_overlay_that_records_no_parent_goes_on_recording_none() {
    let size = 40 * GRAIN;
    let top = Spec::new(size, 7, u32::MAX).with([(3, State::Data(0x21))]);
    let before = files(&top, &Spec::new(size, 5, u32::MAX).with([(4, State::Data(0x43))]), None);
    let want = expected(&Kit, &before);
    let io = Vmdk.committed(before, Options::default());
    assert!(views(&io.files) == want);
    assert_eq!(View::new(&io.files[&OVERLAY]).parent(), u32::MAX);
}
