//! A base that grows: where the map has room, and where blocks have to make way for a longer one.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_vdi_testkit::pair::{assert_goes_with_none_but, files, run, views, Files, OVERLAY};
use instar_vdi_testkit::{crashes, le32, le64, put32, Spec, State, View, BLOCK};

const GROW: Options = Options {
    keep_overlay: false,
    dry_run: false,
    resize_backing: true,
    bitmaps: false,
    disabled_bitmaps: false,
    new_target: false,
};

fn data(blocks: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    blocks.into_iter().map(|block| (block, State::Data(seed))).collect()
}

/// Commit, and every crash of it.
fn grow(before: &Files) -> Files {
    let (_, overlay) = views(before);
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, GROW, u64::MAX).unwrap();
    let finished = |files: &Files| {
        let now = views(files);
        assert!(now.0 == overlay && now.1 == overlay, "something reads wrong");
        View::new(&files[&DEVICE_OUTPUT]).assert_tidy();
        View::new(&files[&OVERLAY]).assert_tidy();
    };
    finished(&io.files);
    let states = crashes().each(before, &io.log, &mut |files| {
        assert!(views(&files).1 == overlay, "the overlay changed its content");
        View::new(&files[&DEVICE_OUTPUT]).assert_consistent();
        View::new(&files[&DEVICE_OUTPUT]).assert_within_file();
        assert_goes_with_none_but(&files, before, &overlay);
        let mut io = MemoryDevices::new(files);
        run(&mut io, GROW, u64::MAX).unwrap();
        finished(&io.files);
    });
    println!("crash states: {states}");
    io.files
}

#[test]
fn within_the_room_that_the_map_has() {
    let base = Spec { room: 200, ..Spec::new(50 * BLOCK - 512, 2, 0).with(data([0, 49], 0x80)) };
    let top = Spec::new(200 * BLOCK, 3, 2).with(data([0, 1, 50, 199], 0x40));
    let after = grow(&files(&top, &base, None));
    let bytes = &after[&DEVICE_OUTPUT];
    assert_eq!((le32(bytes, 340), le32(bytes, 344), le32(bytes, 384)), (512, 1536, 200));
}

#[test]
fn where_blocks_make_way() {
    // 1,200 entries take five blocks.
    for blocks in [data([], 0), data([7], 0x80), data(0..4, 0x80), data(0..50, 0x80)] {
        let base = Spec::new(50 * BLOCK - 512, 2, 0).with(blocks);
        let top = Spec::new(1200 * BLOCK, 3, 2).with(data([0, 1, 50, 1199], 0x40));
        let before = files(&top, &base, None);
        let data_at = le32(&before[&DEVICE_OUTPUT], 344);
        let after = grow(&before);
        let bytes = &after[&DEVICE_OUTPUT];
        assert_eq!((le32(bytes, 340), le32(bytes, 344)), (data_at, data_at + 5 * BLOCK));
        assert_eq!((le32(bytes, 384), le64(bytes, 368)), (1200, 1200 * BLOCK as u64));
        // It can be committed into once more.
        let again = Spec::new(1210 * BLOCK, 3, 2).with(data([2, 1205], 0x41));
        let mut next = files(&again, &base, None);
        next.insert(DEVICE_OUTPUT, bytes.clone());
        next.get_mut(&OVERLAY).unwrap()[440..456].copy_from_slice(&View::new(bytes).identity()[1]);
        let want = views(&next).1;
        let mut io = MemoryDevices::new(next);
        run(&mut io, GROW, u64::MAX).unwrap();
        assert!(views(&io.files).0 == want);
    }
}

#[test]
fn what_is_below_shows_no_more_than_it_did() {
    // An ancestor that is longer than the base was; the last block is cut, and held or not.
    for last in [vec![], vec![(9, State::Data(0x81))], vec![(9, State::Zero)]] {
        for room in [0, 100] {
            let base = Spec { room, ..Spec::new(10 * BLOCK - 512, 2, 1).with(last.clone()) };
            let base = Spec { entries: 10 + room / 20, ..base };
            let root = Spec::new(30 * BLOCK, 1, 0).with(data(5..25, 0x11));
            let top = Spec::new(60 * BLOCK, 3, 2).with(data([0, 12], 0x40));
            grow(&files(&top, &base, Some(&root)));
        }
    }
}

#[test]
fn an_empty_overlay_makes_its_base_grow() {
    let before = files(&Spec::new(90 * BLOCK, 3, 2), &Spec::new(50 * BLOCK, 2, 0).with(data([3], 0x80)), None);
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io, GROW, u64::MAX).unwrap();
    let [was, is] = [&before[&DEVICE_OUTPUT], &io.files[&DEVICE_OUTPUT]].map(|bytes| View::new(bytes));
    assert_eq!((is.size, is.identity()), (90 * BLOCK, was.identity()), "its content is what it was");
    is.assert_tidy();
}

#[test]
fn what_cannot_grow_says_so_before_anything_changes() {
    let top = Spec::new(90 * BLOCK, 3, 2).with(data([80], 0x40));
    let base = Spec::new(50 * BLOCK, 2, 0).with(data([3], 0x80));
    let fixed = files(&top, &base.clone().preallocated(), None);
    let mut beyond = files(&top, &Spec { entries: 60, ..base.clone() }, None);
    put32(beyond.get_mut(&DEVICE_OUTPUT).unwrap(), 512 + 55 * 4, 0);
    put32(beyond.get_mut(&DEVICE_OUTPUT).unwrap(), 512 + 3 * 4, 0xffff_ffff);
    let mut far = files(&top, &base, None);
    // The data begins so far behind that the header could not say where it begins then.
    let bytes = far.get_mut(&DEVICE_OUTPUT).unwrap();
    let map = bytes[512..712].to_vec();
    put32(bytes, 340, 0xffff_fc00 - 512);
    put32(bytes, 344, 0xffff_fc00);
    bytes.truncate(512);
    drop(map);
    for (before, code, why) in [
        (fixed, ErrorCode::UnsupportedFormat, "a static image cannot grow"),
        (beyond, ErrorCode::BackingCorrupt, "past the end of the disk"),
        (far, ErrorCode::BackingCorrupt, "the map goes past the end of the file"),
    ] {
        let mut io = MemoryDevices::new(before);
        let failure = run(&mut io, GROW, u64::MAX).unwrap_err();
        assert_eq!(failure.error.code, code, "{}", failure.error);
        assert!(failure.error.text.contains(why) && io.log.is_empty(), "{}", failure.error);
    }
}
