//! The commit into a deeper ancestor over in-memory VDI images: the lowest merged layer follows the target, nothing else of
//! what is above it changes, and every crash point can be run again.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::memory::MemoryDevices;
use instar_vdi_testkit::crashes;
use instar_vdi_testkit::pair::{assert_goes_with_none_but, files, lowest, run, views, Files, MIDDLE, OVERLAY};
use instar_vdi_testkit::{build, Spec, State, View, BLOCK};

const SIZE: usize = 300 * BLOCK;
const KEEP: Options = Options {
    keep_overlay: true,
    dry_run: false,
    resize_backing: false,
    bitmaps: false,
    disabled_bitmaps: false,
    new_target: false,
};

fn data(blocks: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    blocks.into_iter().map(|block| (block, State::Data(seed))).collect()
}

fn chain() -> Files {
    let top = Spec::new(SIZE, 4, 3).with(data([0, 1, 200], 0x40)).with([(5, State::Zero)]);
    let middle = Spec::new(SIZE, 3, 2).with(data([1, 2, 5, 299], 0x60));
    let base = Spec::new(SIZE, 2, 0).with(data([2, 9, 30], 0x80));
    let mut files = files(&top, &base, None);
    files.insert(MIDDLE, build(&middle));
    files
}

fn assert_finished(before: &Files, now: &Files, overlay: &[u8]) {
    let (backing, top) = views(now);
    assert!(top == overlay && backing == overlay, "something reads wrong");
    let lowest = lowest(now);
    assert_eq!((lowest.parent(), lowest.announced()), (View::new(&now[&DEVICE_OUTPUT]).identity(), false));
    assert_eq!(now[&OVERLAY], before[&OVERLAY], "the overlay keeps all");
    let (now, before) = (&now[&MIDDLE], &before[&MIDDLE]);
    let differ = |at: &usize| now[*at] != before[*at];
    assert!((0..now.len()).filter(differ).all(|at| (440..456).contains(&at)), "more than uuidParentModify changed");
}

#[test]
fn the_lowest_merged_layer_follows_and_every_crash_can_be_run_again() {
    let before = chain();
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
    println!("crash states: {states}");
    assert!(states > 10);
}

#[test]
fn a_dry_run_and_layers_that_hold_nothing_change_nothing() {
    let before = chain();
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, Options { dry_run: true, ..KEEP }, u64::MAX).unwrap();
    assert_eq!(io.files, before);
    let mut before = files(&Spec::new(SIZE, 4, 3), &Spec::new(SIZE, 2, 0), None);
    before.insert(MIDDLE, build(&Spec::new(SIZE, 3, 2)));
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, KEEP, u64::MAX).unwrap();
    assert_eq!(io.files, before);
}
