//! The commit into a deeper ancestor over in-memory vmdk images: the lowest merged layer follows the target, nothing else of
//! what is above it changes, and every crash point can be run again.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::memory::MemoryDevices;
use instar_vmdk_testkit::crashes;
use instar_vmdk_testkit::pair::{assert_goes_with_none_but, files, lowest, run, views, Files, MIDDLE, OVERLAY};
use instar_vmdk_testkit::{build, Spec, State, View, GRAIN};

const SIZE: usize = 700 * GRAIN;
const KEEP: Options = Options {
    keep_overlay: true,
    dry_run: false,
    resize_backing: false,
    bitmaps: false,
    disabled_bitmaps: false,
    new_target: false,
};

fn data(grains: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    grains.into_iter().map(|grain| (grain, State::Data(seed))).collect()
}

fn chain(footer: bool) -> Files {
    let top = Spec::new(SIZE, 9, 7).with(data([0, 1, 600], 0x40)).with([(5, State::Zero)]);
    let middle = Spec::new(SIZE, 7, 5).with(data([1, 2, 5, 699], 0x60));
    let middle = Spec { compressed: footer, footer, redundant: !footer, ..middle };
    let base = Spec::new(SIZE, 5, u32::MAX).with(data([2, 9, 30], 0x80));
    let mut files = files(&top, &base, None);
    files.insert(MIDDLE, build(&middle));
    files
}

/// What differs between two files, as the first and the last byte.
fn differs(one: &[u8], other: &[u8]) -> Option<(usize, usize)> {
    assert_eq!(one.len(), other.len());
    let differs = |at: &usize| one[*at] != other[*at];
    (0..one.len()).find(differs).zip((0..one.len()).rfind(differs))
}

fn assert_finished(before: &Files, now: &Files, overlay: &[u8]) {
    let (backing, top) = views(now);
    assert!(top == overlay && backing == overlay, "something reads wrong");
    assert_eq!((lowest(now).parent(), lowest(now).announced()), (View::new(&now[&DEVICE_OUTPUT]).cid(), false));
    assert_eq!(now[&OVERLAY], before[&OVERLAY], "the overlay keeps all");
    let (first, last) = differs(&now[&MIDDLE], &before[&MIDDLE]).unwrap();
    assert!(last - first < 8, "more than a content ID changed");
}

#[test]
fn the_lowest_merged_layer_follows_and_every_crash_can_be_run_again() {
    for footer in [false, true] {
        let before = chain(footer);
        let overlay = views(&before).1;
        let mut io = MemoryDevices::new(before.clone());
        run(&mut io, KEEP, u64::MAX).unwrap();
        assert_finished(&before, &io.files, &overlay);
        assert!(io.unflushed().is_empty());
        let states = crashes().each(&before, &io.log, &mut |files| {
            assert!(views(&files).1 == overlay, "the overlay changed its content");
            assert_goes_with_none_but(&files, &before, &overlay);
            let mut io = MemoryDevices::new(files);
            run(&mut io, KEEP, u64::MAX).unwrap();
            assert_finished(&before, &io.files, &overlay);
        });
        assert!(states > 1);
    }
}

#[test]
fn a_dry_run_and_layers_that_hold_nothing_change_nothing() {
    let before = chain(false);
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, Options { dry_run: true, ..KEEP }, u64::MAX).unwrap();
    assert_eq!(io.files, before);
    let mut before = files(&Spec::new(SIZE, 9, 7), &Spec::new(SIZE, 5, u32::MAX), None);
    before.insert(MIDDLE, build(&Spec::new(SIZE, 7, 5)));
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, KEEP, u64::MAX).unwrap();
    assert_eq!(io.files, before);
}
