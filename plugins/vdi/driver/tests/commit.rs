//! The commit over in-memory VDI images: content, identities, what VirtualBox looks at, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::FormatDriver;
use instar_guest_view::Ancestors;
use instar_vdi_driver::Vdi;
use instar_vdi_format::Uuid;
use instar_vdi_testkit::pair::{assert_goes_with_none_but, files, views, Files, ANCESTOR, OVERLAY};
use instar_vdi_testkit::{crashes, device, put32, Spec, State, View, BLOCK};
use std::collections::BTreeSet;

const GROW: Options = Options { keep_overlay: false, dry_run: false, resize_backing: true };

/// As the product does it, with room to grow.
fn run(io: &mut MemoryDevices, options: Options) -> Result<Outcome, CommitFailure> {
    instar_vdi_testkit::pair::run(io, options, u64::MAX)
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
    let (top, base) = (View::new(&files[&OVERLAY]), View::new(&files[&DEVICE_OUTPUT]));
    top.assert_tidy();
    base.assert_consistent();
    assert_eq!((top.held(), top.allocated(), top.bytes.len()), (0, 0, top.data));
    assert_eq!((top.parent(), top.announced()), (base.identity(), false));
}

fn commit_and_verify(files: &Files) -> MemoryDevices {
    let want = expected(files);
    let held = View::new(&files[&OVERLAY]).held() as u64;
    let mut io = MemoryDevices::new(files.clone());
    let outcome = run(&mut io, GROW).unwrap();
    assert_eq!((outcome.clusters_committed, outcome.overlay_clusters_cleared), (held, held));
    assert_finished(&io.files, &want);
    assert_eq!(io.unflushed(), BTreeSet::new());
    let [before, after] = [&files[&DEVICE_OUTPUT], &io.files[&DEVICE_OUTPUT]].map(|bytes| View::new(bytes).identity());
    assert_eq!(before[0], after[0], "it is another image now");
    let child = View::new(&files[&OVERLAY]).identity().concat();
    let next = if held > 0 { Uuid(before[1]).next(&child).0 } else { before[1] };
    assert_eq!(after[1], next);
    // Whoever was made on the overlay goes with it as before.
    assert_eq!(View::new(&files[&OVERLAY]).identity(), View::new(&io.files[&OVERLAY]).identity());
    io
}

fn verify_crashes(before: &Files) {
    let want = expected(before);
    let log = commit_and_verify(before).log;
    let states = crashes().each(before, &log, &mut |files| {
        assert!(views(&files).1 == want.1, "the overlay changed its content");
        for number in [OVERLAY, DEVICE_OUTPUT] {
            let view = View::new(&files[&number]);
            view.assert_consistent();
            view.assert_within_file();
        }
        assert_goes_with_none_but(&files, before, &want.1);
        // Nobody who was made on the backing as it was takes it for that any more.
        let [was, is] = [before, &files].map(|files| View::new(&files[&DEVICE_OUTPUT]).identity()[1]);
        assert!(is != was || views(&files).0 == views(before).0, "other content, and the same uuidModify");
        let mut io = MemoryDevices::new(files);
        run(&mut io, GROW).unwrap();
        assert_finished(&io.files, &want);
        View::new(&io.files[&DEVICE_OUTPUT]).assert_tidy();
    });
    assert!(states > 1);
    println!("crash states: {states}");
}

fn data(blocks: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    blocks.into_iter().map(|block| (block, State::Data(seed))).collect()
}

const SIZE: usize = 300 * BLOCK;

fn pair() -> (Spec, Spec) {
    (Spec::new(SIZE, 3, 2).with(data([0, 1, 2, 9, 200, 299], 0x40)), Spec::new(SIZE, 2, 0).with(data([1, 9, 30], 0x80)))
}

#[test]
fn data_over_everything() {
    let (top, base) = pair();
    verify_crashes(&files(&top, &base, None));
    // Nothing is left of gaps that another program left, if there is enough to fill them.
    for gaps in [vec![0, 2], vec![0, 1, 2, 4]] {
        let before = files(&top, &Spec { gaps, ..base.clone() }, None);
        verify_crashes(&before);
        View::new(&commit_and_verify(&before).files[&DEVICE_OUTPUT]).assert_tidy();
    }
    // A base whose next block would be written over one that is there, as some programs leave it.
    let mut before = files(&top, &base, None);
    put32(before.get_mut(&DEVICE_OUTPUT).unwrap(), 388, 1);
    View::new(&commit_and_verify(&before).files[&DEVICE_OUTPUT]).assert_tidy();
}

#[test]
fn a_base_whose_last_slots_are_lost() {
    // So a crash leaves it: the number went up, and no entry names the slots.
    let (top, base) = pair();
    for held in [vec![0, 1, 2], vec![1]] {
        let mut before = files(&Spec { blocks: data(held, 0x40), ..top.clone() }, &base, None);
        let bytes = before.get_mut(&DEVICE_OUTPUT).unwrap();
        put32(bytes, 388, 7);
        bytes.resize(bytes.len() + 4 * BLOCK, 0x55);
        View::new(&commit_and_verify(&before).files[&DEVICE_OUTPUT]).assert_tidy();
    }
}

#[test]
fn zeroes_on_either_side() {
    let zeroes = [(0, State::Zero), (1, State::Zero), (2, State::Data(3)), (299, State::Zero)];
    let top = Spec::new(SIZE - 512, 3, 2).with(zeroes);
    let base = Spec::new(SIZE - 512, 2, 1).with(data([1, 299], 0x80));
    let root = Spec::new(SIZE, 1, 0).with(data([0, 1, 2, 3, 299], 0x11));
    verify_crashes(&files(&top, &base, Some(&root)));
    verify_crashes(&files(&top, &Spec { parent: 0, ..base.clone() }, None));
    let base = base.with([(0, State::Zero), (2, State::Zero)]);
    verify_crashes(&files(&top, &base, Some(&root)));
    // A block that was data keeps its slot.
    let after = commit_and_verify(&files(&top, &base, Some(&root))).files;
    assert_eq!(View::new(&after[&DEVICE_OUTPUT]).entries[1], 0);
}

#[test]
fn a_smaller_overlay_leaves_the_rest() {
    let top = Spec::new(10 * BLOCK + 512, 3, 2).with(data([3, 10], 0x40));
    let base = Spec::new(SIZE, 2, 1).with(data([11], 0x80));
    let root = Spec::new(11 * BLOCK, 1, 0).with(data([10], 0x11));
    verify_crashes(&files(&top, &base, Some(&root)));
    commit_and_verify(&files(&top, &base.with(data([10], 0x81)), None));
}

#[test]
fn an_empty_overlay_changes_nothing() {
    let before = files(&Spec::new(SIZE, 3, 2), &pair().1, None);
    assert_eq!(commit_and_verify(&before).files, before);
}

#[test]
fn what_an_interrupted_run_left_is_taken_back() {
    // The map is free, and the blocks are still there.
    let (top, base) = pair();
    let mut before = files(&top, &base, None);
    let overlay = before.get_mut(&OVERLAY).unwrap();
    overlay[512..512 + 300 * 4].fill(0xff);
    commit_and_verify(&before);
}

#[test]
fn extra_bytes_are_read_around() {
    let (top, base) = pair();
    commit_and_verify(&files(&Spec { extra: 512, ..top.clone() }, &base, None));
    let mut io = MemoryDevices::new(files(&top, &Spec { extra: 512, ..base }, None));
    let failure = run(&mut io, Options::default()).unwrap_err();
    assert_eq!(failure.error.code, ErrorCode::UnsupportedFormat);
    assert!(failure.error.text.contains("cbBlockExtra") && io.log.is_empty(), "{}", failure.error);
}

#[test]
fn damage_is_found_before_anything_changes() {
    let (top, base) = pair();
    let good = files(&top, &base, None);
    type Damage = (&'static str, fn(&mut Vec<u8>));
    let damages: [Damage; 4] = [
        ("past the end", |bytes| put32(bytes, 512, 1 << 20)),
        ("far past the end", |bytes| put32(bytes, 512, 0xffff_fffd)),
        ("in the same place", |bytes| put32(bytes, 512 + 50 * 4, 0)),
        ("a hole instead of a map", |bytes| bytes[512..1024].fill(0)),
    ];
    for number in [OVERLAY, DEVICE_OUTPUT] {
        for (name, damage) in &damages {
            let mut damaged = good.clone();
            damage(damaged.get_mut(&number).unwrap());
            let mut io = MemoryDevices::new(damaged.clone());
            let failure = run(&mut io, Options::default()).unwrap_err();
            let code = if number == OVERLAY { ErrorCode::OverlayCorrupt } else { ErrorCode::BackingCorrupt };
            assert_eq!(failure.error.code, code, "{name}: {}", failure.error);
            assert_eq!(io.files, damaged, "{name}");
        }
    }
}

#[test]
fn static_images_and_contradictions_are_refused() {
    let (top, base) = pair();
    for (overlay, why) in [
        (Spec { image_type: Some(2), ..top.clone() }, "static"),
        (Spec { image_type: Some(4), parent: 0, ..top.clone() }, "uuidLinkage is null"),
    ] {
        let mut io = MemoryDevices::new(files(&overlay, &base, None));
        let failure = run(&mut io, Options::default()).unwrap_err();
        assert!(failure.error.text.contains(why) && io.log.is_empty(), "{}", failure.error);
    }
    // Without a parent, a static one is read; it cannot be emptied.
    let fixed = Spec { parent: 0, ..top }.preallocated();
    let mut io = MemoryDevices::new(files(&fixed, &base, None));
    assert!(run(&mut io, Options::default()).unwrap_err().error.text.contains("cannot be emptied"));
    let want = expected(&io.files);
    run(&mut io, Options { keep_overlay: true, ..Options::default() }).unwrap();
    assert!(views(&io.files) == want);
}

#[test]
fn a_parent_that_is_another_image_is_not_followed() {
    let (top, base) = pair();
    let mut io = MemoryDevices::new(files(&Spec { parent: 7, ..top }, &base, None));
    let failure = run(&mut io, Options::default()).unwrap_err();
    assert!(failure.error.text.contains("identity of the parent") && io.log.is_empty(), "{}", failure.error);
}

#[test]
fn too_little_room_is_found_before_anything_changes() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    let length = before[&DEVICE_OUTPUT].len() as u64;
    // Four blocks are new.
    for (blocks, enough) in [(4, true), (3, false)] {
        let mut io = MemoryDevices::new(before.clone());
        match instar_vdi_testkit::pair::run(&mut io, Options::default(), length + blocks * BLOCK as u64) {
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
    let top = top.with([(40, State::Zero), (41, State::Zero)]);
    let root = Spec::new(SIZE, 1, 0).with(data([0, 40, 42], 0x11));
    for (blocks, enough) in [(4, true), (3, false)] {
        let mut before = files(&top, &Spec { parent: 1, ..base.clone() }, Some(&root));
        let want = expected(&before);
        for number in [OVERLAY, DEVICE_OUTPUT] {
            let bytes = before.get_mut(&number).unwrap();
            bytes.resize(bytes.len() + blocks * BLOCK, 0x99);
        }
        let mut io = MemoryDevices::new(before.clone());
        let fixed = |number: u32| DeviceConfig {
            flags: device_flags::FIXED_LENGTH,
            ..device(number, &before[&number], before[&number].len() as u64)
        };
        io.hold_commit(&fixed(OVERLAY), false, &fixed(DEVICE_OUTPUT));
        let mut source = Vdi::open_source(&mut io, &fixed(OVERLAY)).unwrap();
        let mut sink = Vdi::open_sink(&mut io, &fixed(DEVICE_OUTPUT), true).unwrap();
        let below = Vdi::open_source(&mut io, &device(ANCESTOR, &before[&ANCESTOR], 0)).unwrap();
        let mut below = Ancestors::new(vec![Box::new(below)]);
        let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
        match commit(&mut io, &mut images, Options::default(), &mut |_| {}) {
            Ok(_) => {
                assert!(enough && views(&io.files) == want, "something reads wrong");
                let (top, base) = (View::new(&io.files[&OVERLAY]), View::new(&io.files[&DEVICE_OUTPUT]));
                base.assert_tidy();
                assert_eq!((top.held(), top.allocated()), (0, 0));
                let lengths = [OVERLAY, DEVICE_OUTPUT].map(|number| io.files[&number].len() - before[&number].len());
                assert_eq!(lengths, [0, 0]);
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
    let mut io = MemoryDevices::new(before);
    run(&mut io, Options { keep_overlay: true, ..Options::default() }).unwrap();
    assert!(views(&io.files) == want);
    let (top, base) = (View::new(&io.files[&OVERLAY]), View::new(&io.files[&DEVICE_OUTPUT]));
    assert_eq!((top.held(), top.parent(), top.announced()), (6, base.identity(), false));
}
