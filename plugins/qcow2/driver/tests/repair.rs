//! Images with the dirty bit: refcounts and COPIED flags that say anything at all.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{Options, Step};
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::random::Random;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::checker::{check, snapshot_contents, Report, View};
use instar_qcow2_testkit::damage::{add_bitmap, drop_blocks, flip, put64, set_dirty, set_refcount, spoil, OFFSET};
use instar_qcow2_testkit::pair::{data, expected, is_dirty, verify_crashes, verify_state, views, Pair};
use instar_qcow2_testkit::{be32, be64, run_commit, OVERLAY};

/// Commit; afterwards content and snapshots are right, and both files are clean and without the dirty bit.
fn repair_and_verify(pair: &Pair) -> MemoryDevices {
    let (backing, overlay) = expected(pair);
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    assert!(views(&io.files) == (backing, overlay), "wrong content");
    for (device, before) in [(DEVICE_OUTPUT, &pair.backing), (OVERLAY, &pair.overlay)] {
        let after = &io.files[&device];
        assert_eq!(check(after), Report::default(), "device {device}");
        assert!(!is_dirty(after));
        assert!(snapshot_contents(after, None) == snapshot_contents(before, None), "a snapshot changed");
    }
    assert!(View::new(&io.files[&OVERLAY]).entries().is_empty());
    io
}

/// Some of everything on both sides.
fn specs(bits: u32, order: u32, snapshots: usize, compressed: bool) -> (Spec, Spec) {
    let size = 300u64 << bits;
    let base = Spec { refcount_order: order, table_clusters: 4, ..Spec::new(bits, size) };
    let mut overlay = base.clone().with(data([0, 1, 2, 150, 298, 299], 0x40)).with([
        (3, State::Zero),
        (4, State::ZeroAllocated(5)),
        (6, State::Zero),
    ]);
    let mut backing = base.with(data([1, 2, 3, 70, 151, 299], 0x80)).with([(5, State::ZeroAllocated(7))]);
    if compressed {
        overlay.clusters.extend((100..106).map(|c| (c, State::Deflated(0x55))));
        backing.clusters.extend([0, 4, 6, 7, 8, 103].map(|c| (c, State::Deflated(0x66))));
    }
    (overlay.snapshots, backing.snapshots) = (snapshots, snapshots);
    (overlay, backing)
}

#[test]
fn any_refcounts_and_flags_on_either_side() {
    for bits in [9, 12, 16] {
        for order in 0..=6 {
            for snapshots in [0, 2] {
                // Several compressed clusters share a host cluster.
                let most = if bits == 9 { 2 } else { 3 };
                if order < most && snapshots > 0 {
                    continue;
                }
                let (overlay, backing) = specs(bits, order, snapshots, order > most);
                for sides in 1..4 {
                    let mut pair = Pair::new(&overlay, &backing);
                    if sides & 1 != 0 {
                        spoil(&mut pair.overlay, u64::from(bits * 100 + order));
                    }
                    if sides & 2 != 0 {
                        spoil(&mut pair.backing, u64::from(bits * 100 + order + 50));
                    }
                    repair_and_verify(&pair);
                }
            }
        }
    }
}

#[test]
fn every_crash_leaves_an_image_that_is_repaired_next_time() {
    for (snapshots, compressed) in [(0, false), (2, false), (1, true)] {
        let (overlay, backing) = specs(9, 4, snapshots, compressed);
        for sides in 1..4 {
            let mut pair = Pair::new(&overlay, &backing);
            if sides & 1 != 0 {
                spoil(&mut pair.overlay, 1);
            }
            if sides & 2 != 0 {
                spoil(&mut pair.backing, 2);
            }
            verify_crashes(&pair);
        }
    }
}

#[test]
fn refcount_blocks_are_missing() {
    // A block describes 256 clusters.
    let spec = Spec::new(9, 1_200 << 9).with(data(0..700, 0x12));
    let other = Spec::new(9, 1_200 << 9).with(data([0, 5, 699, 900], 0x34));
    for dropped in [&[0][..], &[1], &[0, 1, 2], &[2]] {
        for swapped in [false, true] {
            let mut pair = if swapped { Pair::new(&spec, &other) } else { Pair::new(&other, &spec) };
            drop_blocks(if swapped { &mut pair.overlay } else { &mut pair.backing }, dropped);
            repair_and_verify(&pair);
        }
    }
    let mut pair = Pair::new(&Spec::new(9, 1_200 << 9).with(data([0, 5, 900], 0x34)), &spec);
    drop_blocks(&mut pair.backing, &[0, 2]);
    verify_crashes(&pair);
    // The overlay has snapshots.
    let small = Spec { snapshots: 1, ..Spec::new(9, 1_200 << 9).with(data(0..300, 0x34)) };
    let mut pair = Pair::new(&small, &Spec::new(9, 1_200 << 9));
    drop_blocks(&mut pair.overlay, &[0, 1]);
    repair_and_verify(&pair);
}

#[test]
fn the_refcount_table_is_too_short() {
    // One cluster of table describes 64 blocks of 256 clusters.
    let backing = Spec { table_clusters: 2, ..Spec::new(9, 17_000 << 9) }.with(data(0..16_500, 0x12));
    let mut pair = Pair::new(&Spec::new(9, 17_000 << 9).with(data([0, 5, 900, 16_999], 0x34)), &backing);
    set_dirty(&mut pair.backing);
    pair.backing[59] = 1;
    let io = repair_and_verify(&pair);
    assert!(be32(&io.files[&DEVICE_OUTPUT], 56) > 1);
    let mut pair = Pair { overlay: pair.backing, ..Pair::new(&backing, &Spec::new(9, 17_000 << 9)) };
    pair.overlay[4..8].copy_from_slice(&3u32.to_be_bytes());
    repair_and_verify(&pair);
}

#[test]
fn little_memory_takes_many_passes() {
    // 18 chunks of 256 clusters are counted at once.
    let backing = Spec { table_clusters: 2, snapshots: 1, ..Spec::new(9, 17_000 << 9) }
        .with((0..16_000).filter(|c| c % 7 != 0).map(|c| (c, State::Data(c as u8))));
    let overlay = Spec { table_clusters: 2, ..Spec::new(9, 17_000 << 9) }.with(data((0..6_000).map(|c| c * 2), 0x34));
    for (overlay, backing) in [(&overlay, &backing), (&backing, &overlay)] {
        let mut pair = Pair::new(overlay, backing);
        for bytes in [&mut pair.overlay, &mut pair.backing] {
            [0, 100, 255, 256, 5_000, 11_111].into_iter().for_each(|cluster| set_refcount(bytes, cluster, 9));
            let table = be64(bytes, be64(bytes, 40) as usize) & OFFSET;
            let mut random = Random::seeded(6);
            (0..64).for_each(|i| flip(bytes, table + i * 8, &mut random));
            drop_blocks(bytes, &[7]);
        }
        let before = expected(&pair);
        let mut io = pair.io();
        io.heap = Some(60 << 10);
        run_commit(&mut io, Options::default()).unwrap();
        assert!(views(&io.files) == before, "wrong content");
        assert_eq!(check(&io.files[&DEVICE_OUTPUT]), Report::default());
        assert_eq!(check(&io.files[&OVERLAY]), Report::default());
        // What is to be written has to fit.
        spoil(&mut pair.backing, 12);
        let mut io = pair.io();
        io.heap = Some(60 << 10);
        assert_eq!(run_commit(&mut io, Options::default()).unwrap_err().error.code, ErrorCode::ScratchTooSmall);
        assert_eq!(io.log, vec![]);
    }
}

#[test]
fn leaks_past_the_end_of_the_file_go() {
    let (overlay, backing) = specs(9, 4, 0, false);
    let mut pair = Pair::new(&overlay, &backing);
    set_dirty(&mut pair.backing);
    let end = pair.backing.len() as u64 / 512;
    (end..end + 20).for_each(|cluster| set_refcount(&mut pair.backing, cluster, 7));
    repair_and_verify(&pair);
}

#[test]
fn an_empty_overlay_has_its_backing_repaired_all_the_same() {
    let mut pair = Pair::new(&Spec::new(12, 40 << 12), &Spec::new(12, 40 << 12).with(data(0..9, 3)));
    spoil(&mut pair.overlay, 8);
    spoil(&mut pair.backing, 9);
    repair_and_verify(&pair);
}

#[test]
fn what_is_not_to_be_changed_stays_dirty() {
    let (overlay, backing) = specs(12, 4, 0, false);
    let mut pair = Pair::new(&overlay, &backing);
    spoil(&mut pair.overlay, 4);
    spoil(&mut pair.backing, 5);
    let mut io = pair.io();
    run_commit(&mut io, Options { dry_run: true, ..Options::default() }).unwrap();
    assert_eq!(io.log, vec![]);
    run_commit(&mut io, Options { keep_overlay: true, ..Options::default() }).unwrap();
    assert!(io.files[&OVERLAY] == pair.overlay, "the overlay was changed");
    assert_eq!(check(&io.files[&DEVICE_OUTPUT]), Report::default());
}

#[test]
fn what_an_unknown_header_extension_may_own_is_not_freed() {
    let (overlay, backing) = specs(12, 4, 0, false);
    let mut pair = Pair::new(&overlay, &Spec { leaks: 3, ..backing });
    spoil(&mut pair.backing, 5);
    pair.backing[104..112].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0]);
    // Header, table of four clusters and L1 table come before the leaks.
    (6..9).for_each(|cluster| set_refcount(&mut pair.backing, cluster, 1));
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    let view = View::new(&io.files[&DEVICE_OUTPUT]);
    assert!((6..9).all(|cluster| view.refcount(cluster) == 1));
    assert_eq!(check(view.bytes).errors, Vec::<String>::new());
}

#[test]
fn bitmaps_of_the_overlay_keep_their_clusters() {
    for snapshots in [0, 1] {
        let (overlay, backing) = specs(12, 4, snapshots, true);
        let mut pair = Pair::new(&Spec { leaks: 3, ..overlay }, &backing);
        add_bitmap(&mut pair.overlay, 6);
        let clusters = pair.overlay[6 << 12..9 << 12].to_vec();
        spoil(&mut pair.overlay, 3);
        let (backing, overlay) = expected(&pair);
        let mut io = pair.io();
        run_commit(&mut io, Options::default()).unwrap();
        assert!(views(&io.files) == (backing, overlay), "wrong content");
        let after = &io.files[&OVERLAY];
        assert!(after[6 << 12..9 << 12] == clusters, "the bitmap changed");
        assert!((6..9).all(|cluster| View::new(after).refcount(cluster) == 1));
        assert_eq!(check(after), Report::default());
        // Without the autoclear bit there are no bitmaps, only leaks.
        put64(&mut pair.overlay, 88, 0);
        repair_and_verify(&pair);
        // A bitmap in a cluster of something else.
        put64(&mut pair.overlay, 88, 1);
        put64(&mut pair.overlay, 7 << 12, 10 << 12);
        refused(&pair, ErrorCode::OverlayCorrupt, "overlaps");
    }
}

#[test]
fn whatever_the_metadata_says_it_is_repaired_or_refused() {
    let mut random = Random::seeded(77);
    let (overlay, backing) = specs(9, 4, 1, true);
    let mut whole = Pair::new(&Spec { leaks: 3, ..overlay }, &Spec { leaks: 3, ..backing });
    add_bitmap(&mut whole.overlay, 6);
    set_dirty(&mut whole.overlay);
    set_dirty(&mut whole.backing);
    let (mut done, mut refused) = (0, 0);
    for _ in 0..10_000 {
        let (overlay, backing) = (whole.overlay.clone(), whole.backing.clone());
        let mut pair = Pair::of(overlay, backing);
        let bytes = if random.below(2) == 0 { &mut pair.overlay } else { &mut pair.backing };
        for _ in 0..=random.below(2) {
            // Any 8 bytes of header, tables, or the rest.
            let end = [140, 12 << 9, bytes.len() as u64 - 8][random.below(3) as usize];
            let at = random.below(end / 4) * 4;
            let was = be64(bytes, at as usize);
            let value = [was ^ 1 << random.below(64), random.below(200) << 9, u64::MAX, 0][random.below(4) as usize];
            put64(bytes, at, value);
        }
        if &bytes[..4] != b"QFI\xfb" || be32(bytes, 20) > 21 {
            continue;
        }
        let mut io = pair.io();
        match run_commit(&mut io, Options::default()) {
            Ok(_) => done += 1,
            Err(failure) => {
                refused += 1;
                let code = failure.error.code;
                assert_ne!(code, ErrorCode::InternalOverflow, "{}", failure.error);
                assert_eq!(io.log, vec![], "{:?} {}", failure.step, failure.error);
            }
        }
    }
    assert!(done > 300 && refused > 300, "{done} {refused}");
}

/// Commit, expect the code, and that nothing was changed.
fn refused(pair: &Pair, code: ErrorCode, word: &str) {
    let mut io = pair.io();
    let failure = run_commit(&mut io, Options::default()).unwrap_err();
    assert_eq!(failure.error.code, code, "{}", failure.error);
    assert!(failure.error.text.contains(word), "{:?} lacks {word:?}", failure.error.text);
    assert!(matches!(failure.step, Step::Check | Step::Plan));
    assert_eq!(io.log, vec![], "something was changed");
}

#[test]
fn a_request_that_fails_loses_nothing() {
    let (overlay, backing) = specs(9, 4, 1, true);
    let mut pair = Pair::new(&overlay, &backing);
    spoil(&mut pair.overlay, 4);
    spoil(&mut pair.backing, 5);
    drop_blocks(&mut pair.backing, &[1]);
    let (backing, overlay) = expected(&pair);
    for number in 0.. {
        let mut io = pair.io();
        io.fail_at = Some(number);
        if run_commit(&mut io, Options::default()).is_ok() {
            assert!(number > 100, "only {number} requests");
            return;
        }
        verify_state(&pair, &io.files, &overlay, &backing);
    }
}

#[test]
fn what_no_repair_can_help_is_refused() {
    let (overlay, backing) = specs(12, 4, 0, false);
    let l2 = |bytes: &[u8]| be64(bytes, be64(bytes, 40) as usize) & OFFSET;
    // Where the refcount table is.
    const SIZE: u64 = 1 << 12;
    type Edit = fn(&mut Vec<u8>, u64);
    // The overlay does not touch guest cluster 70 of the backing.
    let edits: [(Edit, &str); 5] = [
        (|b, l2| put64(b, l2 + 70 * 8, 1 << 40), "past the end"),
        (|b, l2| put64(b, l2 + 70 * 8, l2), "overlaps"),
        (|b, l2| b.copy_within(l2 as usize + 8..l2 as usize + 16, l2 as usize + 70 * 8), "overlaps"),
        (|b, l2| put64(b, l2 + 70 * 8, 5 << 13 | 1 << 57), "reserved"),
        (|b, _| put64(b, SIZE + 8, 512), "not the start of a cluster"),
    ];
    for (edit, word) in edits {
        for other_dirty in [false, true] {
            let mut pair = Pair::new(&overlay, &backing);
            set_dirty(&mut pair.backing);
            let at = l2(&pair.backing);
            edit(&mut pair.backing, at);
            if other_dirty {
                set_dirty(&mut pair.overlay);
            }
            refused(&pair, ErrorCode::BackingCorrupt, word);
            let mut pair = Pair::new(&overlay, &backing);
            set_dirty(&mut pair.overlay);
            let at = l2(&pair.overlay);
            edit(&mut pair.overlay, at);
            refused(&pair, ErrorCode::OverlayCorrupt, word);
        }
    }
}

#[test]
fn more_references_than_a_refcount_can_count() {
    let deflated = Spec::new(12, 64 << 12).with((0..8).map(|c| (c, State::Deflated(0))));
    let plain = Spec::new(12, 64 << 12).with(data([20], 1));
    for swapped in [false, true] {
        let mut pair = if swapped { Pair::new(&deflated, &plain) } else { Pair::new(&plain, &deflated) };
        let bytes = if swapped { &mut pair.overlay } else { &mut pair.backing };
        set_dirty(bytes);
        // Refcounts of one bit: everything else is in the first block, too.
        bytes[96..100].copy_from_slice(&0u32.to_be_bytes());
        refused(&pair, ErrorCode::RefcountExhausted, "references");
    }
}

/// Found by the crash simulator: the repair wrote refcounts into a table that nobody looked at.
#[test]
fn a_refcount_block_that_is_an_l2_table_past_the_end_of_the_disk() {
    for device in [OVERLAY, DEVICE_OUTPUT] {
        let mut pair =
            Pair::new(&Spec::new(9, 200 << 9).with(data([1], 7)), &Spec::new(9, 200 << 9).with(data([1], 9)));
        let bytes = if device == OVERLAY { &mut pair.overlay } else { &mut pair.backing };
        *bytes = build(&Spec::new(9, 200 << 9).with(data([1, 100], 7)));
        // Four clusters are left of the disk: the second table is past its end.
        bytes[24..32].copy_from_slice(&u64::to_be_bytes(4 << 9));
        bytes[79] |= 1;
        let (l1, refcounts) = (be64(bytes, 40) as usize, be64(bytes, 48) as usize);
        let table = be64(bytes, l1 + 8) & !(1 << 63);
        bytes[refcounts..refcounts + 8].copy_from_slice(&table.to_be_bytes());
        if device == DEVICE_OUTPUT {
            pair.overlay[24..32].copy_from_slice(&u64::to_be_bytes(4 << 9));
        }
        let mut io = pair.io();
        let failure = run_commit(&mut io, pair.options()).unwrap_err();
        assert!(failure.error.text.contains("overlap"), "{}", failure.error);
        assert_eq!(io.log, vec![], "something was changed");
    }
}
