//! The commit over in-memory VDI images: content, identities, what VirtualBox looks at, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_testkit::trial::{Done, Trial};
use instar_testkit::FormatKit;
use instar_vdi_format::Uuid;
use instar_vdi_testkit::pair::{assert_goes_with_none_but, files, views, Files, OVERLAY};
use instar_vdi_testkit::{put32, Kit, Spec, State, View, BLOCK};

struct Vdi;

impl Trial for Vdi {
    fn kit(&self) -> &dyn FormatKit {
        &Kit
    }

    fn held(&self, overlay: &[u8]) -> u64 {
        View::new(overlay).held() as u64
    }

    fn assert_finished(&self, files: &Files) {
        let (top, base) = (View::new(&files[&OVERLAY]), View::new(&files[&DEVICE_OUTPUT]));
        top.assert_tidy();
        base.assert_consistent();
        assert_eq!((top.held(), top.allocated(), top.bytes.len()), (0, 0, top.data));
        assert_eq!((top.parent(), top.announced()), (base.identity(), false));
    }

    fn assert_done(&self, Done { before, after }: Done<'_>) {
        let [was, is] = [before, after].map(|files| View::new(&files[&DEVICE_OUTPUT]).identity());
        assert_eq!(was[0], is[0], "it is another image now");
        let top = View::new(&before[&OVERLAY]);
        let next = if top.held() > 0 { Uuid(was[1]).next(&top.identity().concat()).0 } else { was[1] };
        assert_eq!(is[1], next);
        // An image that was made on the overlay matches it as before.
        assert_eq!(top.identity(), View::new(&after[&OVERLAY]).identity());
    }

    fn assert_instant(&self, Done { before, .. }: Done<'_>, now: &Files) {
        for number in [OVERLAY, DEVICE_OUTPUT] {
            let view = View::new(&now[&number]);
            view.assert_consistent();
            view.assert_within_file();
        }
        assert_goes_with_none_but(now, before, &views(before).1);
        // Nobody who was made on the backing as it was takes it for that any more.
        let [was, is] = [before, now].map(|files| View::new(&files[&DEVICE_OUTPUT]).identity()[1]);
        assert!(is != was || views(now).0 == views(before).0, "other content, and the same uuidModify");
    }

    fn assert_done_again(&self, _: Done<'_>, again: &Files) {
        View::new(&again[&DEVICE_OUTPUT]).assert_tidy();
    }
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
    Vdi.verify_crashes(&files(&top, &base, None));
    // Nothing is left of gaps that another program left, if there is enough to fill them.
    for gaps in [vec![0, 2], vec![0, 1, 2, 4]] {
        let before = files(&top, &Spec { gaps, ..base.clone() }, None);
        Vdi.verify_crashes(&before);
        View::new(&Vdi.commit_and_verify(&before).files[&DEVICE_OUTPUT]).assert_tidy();
    }
    // A base whose next block would be written over one that is there, as some programs leave it.
    let mut before = files(&top, &base, None);
    put32(before.get_mut(&DEVICE_OUTPUT).unwrap(), 388, 1);
    View::new(&Vdi.commit_and_verify(&before).files[&DEVICE_OUTPUT]).assert_tidy();
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
        View::new(&Vdi.commit_and_verify(&before).files[&DEVICE_OUTPUT]).assert_tidy();
    }
}

#[test]
fn zeroes_on_either_side() {
    let zeroes = [(0, State::Zero), (1, State::Zero), (2, State::Data(3)), (299, State::Zero)];
    let top = Spec::new(SIZE - 512, 3, 2).with(zeroes);
    let base = Spec::new(SIZE - 512, 2, 1).with(data([1, 299], 0x80));
    let root = Spec::new(SIZE, 1, 0).with(data([0, 1, 2, 3, 299], 0x11));
    Vdi.verify_crashes(&files(&top, &base, Some(&root)));
    Vdi.verify_crashes(&files(&top, &Spec { parent: 0, ..base.clone() }, None));
    let base = base.with([(0, State::Zero), (2, State::Zero)]);
    Vdi.verify_crashes(&files(&top, &base, Some(&root)));
    // A block that was data keeps its slot.
    let after = Vdi.commit_and_verify(&files(&top, &base, Some(&root))).files;
    assert_eq!(View::new(&after[&DEVICE_OUTPUT]).entries[1], 0);
}

#[test]
fn a_smaller_overlay_leaves_the_rest() {
    let top = Spec::new(10 * BLOCK + 512, 3, 2).with(data([3, 10], 0x40));
    let base = Spec::new(SIZE, 2, 1).with(data([11], 0x80));
    let root = Spec::new(11 * BLOCK, 1, 0).with(data([10], 0x11));
    Vdi.verify_crashes(&files(&top, &base, Some(&root)));
    Vdi.commit_and_verify(&files(&top, &base.with(data([10], 0x81)), None));
}

#[test]
fn an_empty_overlay_changes_nothing() {
    let before = files(&Spec::new(SIZE, 3, 2), &pair().1, None);
    assert_eq!(Vdi.commit_and_verify(&before).files, before);
}

#[test]
fn what_an_interrupted_run_left_is_taken_back() {
    // The map is free, and the blocks are still there.
    let (top, base) = pair();
    let mut before = files(&top, &base, None);
    let overlay = before.get_mut(&OVERLAY).unwrap();
    overlay[512..512 + 300 * 4].fill(0xff);
    Vdi.commit_and_verify(&before);
}

#[test]
fn extra_bytes_are_read_around() {
    let (top, base) = pair();
    Vdi.commit_and_verify(&files(&Spec { extra: 512, ..top.clone() }, &base, None));
    let before = files(&top, &Spec { extra: 512, ..base }, None);
    Vdi.verify_refused(&before, Options::default(), ErrorCode::UnsupportedFormat, "cbBlockExtra");
}

#[test]
fn damage_is_found_before_anything_changes() {
    let (top, base) = pair();
    Vdi.verify_damages(
        &files(&top, &base, None),
        &[
            ("past the end of the file", &|bytes| put32(bytes, 512, 1 << 20)),
            ("in slot 4294967293, past the end", &|bytes| put32(bytes, 512, 0xffff_fffd)),
            ("in the same place", &|bytes| put32(bytes, 512 + 50 * 4, 0)),
            // A hole instead of a map.
            ("in the same place", &|bytes| bytes[512..1024].fill(0)),
        ],
    );
}

#[test]
fn static_images_and_contradictions_are_refused() {
    let (top, base) = pair();
    for (overlay, why) in [
        (Spec { image_type: Some(2), ..top.clone() }, "static"),
        (Spec { image_type: Some(4), parent: 0, ..top.clone() }, "uuidLinkage is null"),
    ] {
        Vdi.verify_refused(&files(&overlay, &base, None), Options::default(), ErrorCode::UnsupportedFormat, why);
    }
    // Without a parent, a static one is read; it cannot be emptied.
    let fixed = Spec { parent: 0, ..top }.preallocated();
    let before = files(&fixed, &base, None);
    Vdi.verify_refused(&before, Options::default(), ErrorCode::UnsupportedFormat, "cannot be emptied");
    let kept = Vdi.committed(before.clone(), Options { keep_overlay: true, ..Options::default() });
    assert!(views(&kept.files) == instar_testkit::pair::expected(&Kit, &before));
}

#[test]
fn a_parent_that_is_another_image_is_not_followed() {
    let (top, base) = pair();
    let before = files(&Spec { parent: 7, ..top }, &base, None);
    Vdi.verify_refused(&before, Options::default(), ErrorCode::InternalOverflow, "identity of the parent");
}

#[test]
fn too_little_room_is_found_before_anything_changes() {
    let (top, base) = pair();
    let before = files(&top, &base, None);
    // Four blocks are new.
    Vdi.verify_room(&before, before[&DEVICE_OUTPUT].len() + 4 * BLOCK);
}

#[test]
fn a_device_that_keeps_its_length() {
    let (top, base) = pair();
    let top = top.with([(40, State::Zero), (41, State::Zero)]);
    let root = Spec::new(SIZE, 1, 0).with(data([0, 40, 42], 0x11));
    let before = files(&top, &Spec { parent: 1, ..base }, Some(&root));
    let longer = |blocks: usize| [OVERLAY, DEVICE_OUTPUT].map(|number| before[&number].len() + blocks * BLOCK);
    let after = Vdi.commit_on_devices(&before, longer(4)).unwrap();
    View::new(&after[&DEVICE_OUTPUT]).assert_tidy();
    let top = View::new(&after[&OVERLAY]);
    assert_eq!((top.held(), top.allocated()), (0, 0));
    assert_eq!(Vdi.commit_on_devices(&before, longer(3)), None);
}

#[test]
fn io_errors_leave_a_pair_that_can_be_committed() {
    let (top, base) = pair();
    Vdi.verify_failing_requests(&files(&top, &base, None));
}

#[test]
fn dry_runs_and_kept_overlays() {
    let (top, base) = pair();
    let kept = Vdi.verify_dry_and_kept(&files(&top, &base, None));
    let (top, base) = (View::new(&kept[&OVERLAY]), View::new(&kept[&DEVICE_OUTPUT]));
    assert_eq!((top.held(), top.parent(), top.announced()), (6, base.identity(), false));
}
