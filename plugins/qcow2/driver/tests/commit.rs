//! The commit over in-memory qcow2 images: content, consistency, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::Change;
use instar_guest_sdk::random::Random;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::pair::{
    clean, commit_and_verify, data, expected, unknown_autoclear, verify_crashes, verify_state, Pair,
};
use instar_qcow2_testkit::{run_commit, OVERLAY};

#[test]
fn every_cluster_size_and_version() {
    for bits in 9..=21 {
        for (top, base) in [(3, 3), (2, 2), (2, 3), (3, 2)] {
            let size = 40u64 << bits;
            let overlay = Spec::new(bits, size).version(top).with(data([0, 1, 2, 7, 39], 0x40));
            let backing = Spec::new(bits, size).version(base).with(data([1, 7, 8], 0x80));
            commit_and_verify(&Pair::new(&overlay, &backing));
        }
    }
}

#[test]
fn zero_clusters_of_both_kinds_over_everything() {
    let states = [None, Some(State::Data(0x11)), Some(State::Zero), Some(State::ZeroAllocated(0x22))];
    let mut overlay = Spec::new(12, 20 << 12);
    let mut backing = Spec::new(12, 20 << 12);
    for (i, (top, base)) in states.iter().flat_map(|t| states.iter().map(move |b| (*t, *b))).enumerate() {
        overlay.clusters.extend(top.map(|state| (i as u64, state)));
        backing.clusters.extend(base.map(|state| (i as u64, state)));
    }
    commit_and_verify(&Pair::new(&overlay, &backing));
    let mut with_ancestor = Pair::new(&overlay, &backing);
    with_ancestor.ancestor = Some(build(&Spec::new(12, 20 << 12).with(data(0..20, 0x77))));
    commit_and_verify(&with_ancestor);
    verify_crashes(&with_ancestor);
    // A version 2 backing has no zero flag: zeroes are written, or the cluster is dropped.
    backing.clusters.retain(|_, state| matches!(state, State::Data(_)));
    backing.version = 2;
    commit_and_verify(&Pair::new(&overlay, &backing));
    let mut with_ancestor = Pair::new(&overlay, &backing);
    with_ancestor.ancestor = Some(build(&Spec::new(12, 20 << 12).with(data(0..20, 0x77))));
    commit_and_verify(&with_ancestor);
}

#[test]
fn a_smaller_unaligned_overlay_leaves_the_tail_alone() {
    for ancestor in [false, true] {
        for state in [State::Data(0x33), State::Zero] {
            for base in [vec![], data([4, 5], 0x55), vec![(4, State::ZeroAllocated(9))], vec![(4, State::Zero)]] {
                // The overlay ends 1536 bytes into cluster 4.
                let overlay = Spec::new(12, (4 << 12) + 1536).with([(1, State::Data(7)), (4, state)]);
                let backing = Spec::new(12, 9 << 12).with(base);
                let mut pair = Pair::new(&overlay, &backing);
                pair.ancestor = ancestor.then(|| build(&Spec::new(12, 7 << 12).with(data(0..7, 0x66))));
                commit_and_verify(&pair);
            }
        }
    }
}

#[test]
fn refcount_blocks_and_table_grow() {
    // 512-byte clusters: a block describes 256 clusters, a table cluster 64 blocks.
    let clusters = 40_000u64;
    let overlay = Spec { table_clusters: 4, ..Spec::new(9, clusters << 9) }.with(data(0..clusters, 0x12));
    let backing = Spec::new(9, clusters << 9);
    let io = commit_and_verify(&Pair::new(&overlay, &backing));
    assert!(instar_qcow2_testkit::be32(&io.files[&DEVICE_OUTPUT], 56) > 1, "the refcount table did not grow");
}

/// The crash points of a long commit: before each flush (where the most is in flight), with drawn subsets of
/// what is not flushed: one change alone, all but one, and random ones.
fn verify_crashes_before_flushes(pair: &Pair) {
    let (backing, overlay) = expected(pair);
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    let log = io.log;
    let mut random = Random::seeded(1);
    for end in (0..log.len()).filter(|&i| matches!(log[i], Change::Flush { .. })) {
        let device = log[end].device();
        let durable = log[..end].iter().rposition(|change| *change == Change::Flush { device }).map_or(0, |i| i + 1);
        let unflushed: Vec<usize> = (durable..end).filter(|&i| log[i].device() == device).collect();
        // Metadata is written last: the changes before the flush tell more than the data far ahead of it.
        let recent: Vec<usize> = unflushed.iter().rev().take(12).copied().collect();
        let mut subsets: Vec<Vec<usize>> = Vec::new();
        for &chosen in &recent {
            subsets.push(vec![chosen]);
            subsets.push(unflushed.iter().copied().filter(|&i| i != chosen).collect());
        }
        for _ in 0..12 {
            subsets.push(unflushed.iter().copied().filter(|_| random.coin()).collect());
        }
        let mut base = pair.io().files;
        for (i, change) in log[..end].iter().enumerate() {
            if i < durable || log[i].device() != device {
                change.apply(&mut base);
            }
        }
        println!("crash states: {}", subsets.len());
        for subset in subsets {
            let mut files = base.clone();
            subset.iter().for_each(|&i| log[i].apply(&mut files));
            verify_state(pair, &files, &overlay, &backing);
        }
    }
}

#[test]
fn crashes_while_refcount_blocks_and_table_grow() {
    // The table of one cluster is nearly full: 64 blocks of 256 clusters.
    let overlay = Spec::new(9, 8_000 << 9).with(data((0..300).map(|i| i * 26), 0x12));
    let backing = Spec { leaks: 16_000, ..Spec::new(9, 8_000 << 9) }.with(data([0, 26, 70], 0x90));
    let pair = Pair::new(&overlay, &backing);
    let io = commit_and_verify(&pair);
    assert!(instar_qcow2_testkit::be32(&io.files[&DEVICE_OUTPUT], 56) > 1, "the refcount table did not grow");
    verify_crashes_before_flushes(&pair);
}

#[test]
fn crashes_while_a_refcount_block_is_added() {
    let overlay = Spec::new(9, 8_000 << 9).with(data((0..100).map(|i| i * 70), 0x12));
    let backing = Spec { leaks: 150, ..Spec::new(9, 8_000 << 9) }.with(data([0, 26, 70], 0x90));
    verify_crashes_before_flushes(&Pair::new(&overlay, &backing));
}

/// The entries of tables that are there must not name clusters of a block that the refcount table does not have yet.
#[test]
fn crashes_while_entries_of_old_tables_need_a_new_refcount_block() {
    let overlay = Spec::new(9, 300 << 9).with(data((0..300).filter(|i| i % 5 == 1), 0x12));
    let backing = Spec { leaks: 220, ..Spec::new(9, 300 << 9) }.with(data([0, 64, 128, 192, 256], 0x90));
    let pair = Pair::new(&overlay, &backing);
    let io = commit_and_verify(&pair);
    let blocks = |bytes: &[u8]| {
        let table = instar_qcow2_testkit::be64(bytes, 48) as usize;
        (0..64).filter(|i| instar_qcow2_testkit::be64(bytes, table + i * 8) != 0).count()
    };
    assert!(blocks(&io.files[&DEVICE_OUTPUT]) > blocks(&pair.backing), "no block was added");
    verify_crashes_before_flushes(&pair);
}

#[test]
fn crashes_while_refcount_blocks_are_dropped_from_the_overlay() {
    for blocks_first in [false, true] {
        let overlay = Spec { blocks_first, ..Spec::new(9, 2_000 << 9) }.with(data(0..1_200, 0x12));
        verify_crashes_before_flushes(&Pair::new(&overlay, &Spec::new(9, 2_000 << 9)));
    }
}

#[test]
fn the_overlay_is_touched_last() {
    let overlay = Spec::new(12, 8 << 12).with(data([1], 1)).with([(2, State::Zero)]);
    let io = commit_and_verify(&Pair::new(&overlay, &Spec::new(12, 8 << 12).with(data([1, 2], 2))));
    // The overlay is touched only when the backing is durable to the last bit.
    let first_of_overlay = io.log.iter().position(|change| change.device() == OVERLAY).unwrap();
    let last_of_backing = io.log.iter().rposition(|change| change.device() == DEVICE_OUTPUT).unwrap();
    assert!(last_of_backing < first_of_overlay);
}

#[test]
fn every_crash_point_of_a_plain_commit() {
    let overlay = Spec::new(9, 300 << 9).with(data([0, 1, 5, 63, 64, 150, 299], 0x21)).with([
        (2, State::Zero),
        (3, State::ZeroAllocated(1)),
        (130, State::Zero),
    ]);
    let backing = Spec::new(9, 300 << 9).with(data([1, 2, 4, 5, 130, 131], 0x43));
    verify_crashes(&Pair::new(&overlay, &backing));
}

#[test]
fn emptying_drops_refcount_blocks_and_cuts_the_file() {
    let overlay = Spec { table_clusters: 4, ..Spec::new(9, 3000 << 9) }.with(data(0..3000, 0x12));
    let backing = Spec::new(9, 3000 << 9);
    let pair = Pair::new(&overlay, &backing);
    let io = commit_and_verify(&pair);
    assert!(pair.overlay.len() > 3000 << 9);
    // What stays: header, refcount table, L1 table, and the blocks that describe those, wherever they are.
    let after = &io.files[&OVERLAY];
    let blocks = after[512..512 + 4 * 512].chunks_exact(8).filter(|b| b.iter().any(|&x| x != 0)).count();
    assert!(blocks <= 2, "{blocks} refcount blocks stay");
}

#[test]
fn an_empty_overlay_changes_nothing() {
    let pair = Pair::new(&Spec::new(16, 1 << 20), &Spec::new(16, 1 << 20).with(data([3], 1)));
    let io = commit_and_verify(&pair);
    assert_eq!(io.log, vec![]);
    assert!(io.submits <= 12, "{} submits", io.submits);
}

/// Found by fuzzing: the table went, the entry stayed.
#[test]
fn an_overlay_that_holds_tables_past_its_end_alone_is_emptied() {
    let mut pair = Pair::new(&Spec::new(12, 8 << 12).with(data([3], 7)), &Spec::new(12, 8 << 12).with(data([3], 9)));
    pair.overlay[24..32].fill(0);
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    clean(&io.files[&OVERLAY]);
    verify_crashes(&pair);
}

/// Found by fuzzing: what lies past the end of the disk was not verified, and nevertheless lost a reference.
#[test]
fn what_an_overlay_with_snapshots_maps_past_its_end_is_verified() {
    let overlay = Spec { snapshots: 1, ..Spec::new(9, 200 << 9) }.with(data([1, 6, 80], 7));
    let mut pair = Pair::new(&overlay, &Spec::new(9, 200 << 9).with(data([3], 9)));
    pair.overlay[24..32].copy_from_slice(&u64::to_be_bytes(4 << 9));
    let l1 = instar_qcow2_testkit::be64(&pair.overlay, 40) as usize;
    // The second L2 table "is" the refcount table, which looks like one.
    pair.overlay[l1 + 8..l1 + 16].copy_from_slice(&512u64.to_be_bytes());
    let mut io = pair.io();
    let failure = run_commit(&mut io, Options::default()).unwrap_err();
    assert_eq!(failure.error.code, ErrorCode::OverlayCorrupt, "{}", failure.error);
    assert_eq!(io.log, vec![], "something was changed");
}

#[test]
fn unknown_autoclear_bits_are_cleared_first() {
    for snapshots in [0, 1] {
        let overlay = Spec { autoclear: 1 << 40, snapshots, ..Spec::new(12, 8 << 12) }.with(data([1], 1));
        for (size, resize) in [(8, false), (6, true)] {
            let backing = Spec { autoclear: 1 << 41, ..Spec::new(12, size << 12) };
            let pair = Pair { resize, ..Pair::new(&overlay, &backing.with(data([1], 4))) };
            let io = commit_and_verify(&pair);
            for device in [OVERLAY, DEVICE_OUTPUT] {
                assert_eq!(unknown_autoclear(&io.files[&device]), 0);
                let first = io.log.iter().find(|change| change.device() == device).unwrap();
                assert!(matches!(first, Change::Write { offset: 88, .. }), "{first:?}");
            }
            verify_crashes(&pair);
        }
    }
}

#[test]
fn many_scattered_clusters_take_few_submits() {
    let clusters = 10_000u64;
    let overlay =
        Spec { table_clusters: 64, ..Spec::new(9, (clusters * 40) << 9) }.with(data((0..clusters).map(|i| i * 37), 3));
    let backing = Spec { table_clusters: 64, ..Spec::new(9, (clusters * 40) << 9) };
    let io = commit_and_verify(&Pair::new(&overlay, &backing));
    assert!(io.submits < 200, "{} submits", io.submits);
}

#[test]
fn a_failed_request_leaves_the_overlay_readable_and_running_again_finishes() {
    let overlay = Spec::new(9, 100 << 9).with(data([0, 1, 5, 63, 64, 99], 0x21)).with([(2, State::Zero)]);
    let backing = Spec::new(9, 100 << 9).with(data([1, 2, 4], 0x43));
    let pair = Pair::new(&overlay, &backing);
    let (expected_backing, expected_overlay) = expected(&pair);
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    for request in 0..io.executed() {
        let mut io = pair.io();
        io.fail_at = Some(request);
        run_commit(&mut io, Options::default()).unwrap_err();
        verify_state(&pair, &io.files, &expected_overlay, &expected_backing);
    }
}

#[test]
fn different_cluster_sizes_each_way() {
    for (top, base) in [(9, 12), (12, 9), (9, 16), (16, 9), (12, 21), (21, 12), (10, 11)] {
        for ancestor in [false, true] {
            // The overlay ends within a cluster of either size.
            let size = (5u64 << base.max(top)) + 1536;
            let count = size.div_ceil(1 << top);
            let mut overlay = Spec::new(top, size).with(data([0, 1, 3, count / 2, count - 1], 0x13));
            overlay.clusters.insert(2, State::Zero);
            overlay.clusters.insert(count / 3, State::ZeroAllocated(5));
            let below = size.div_ceil(1 << base);
            let backing = Spec::new(base, size + 512 * 7).with(data([0, below / 2], 0x50));
            let mut pair = Pair::new(&overlay, &backing);
            pair.ancestor =
                ancestor.then(|| build(&Spec::new(11, size / 2048 * 2048).with(data(0..size / 2048, 0x66))));
            commit_and_verify(&pair);
            if top.max(base) < 13 {
                verify_crashes(&pair);
            }
        }
    }
}

#[test]
fn every_refcount_width_on_either_side() {
    for order in 0..=6 {
        for other in [4, order] {
            let overlay = Spec { refcount_order: order, table_clusters: 4, ..Spec::new(9, 3_000 << 9) }
                .with(data(0..700, 0x12))
                .with([(900, State::Zero)]);
            let backing = Spec { refcount_order: other, table_clusters: 4, ..Spec::new(9, 3_000 << 9) }
                .with(data([0, 1, 900, 901], 0x12));
            let pair = Pair::new(&overlay, &backing);
            commit_and_verify(&pair);
            let swapped = Pair::new(
                &Spec { refcount_order: other, ..overlay.clone() },
                &Spec { refcount_order: order, ..backing.clone() },
            );
            commit_and_verify(&swapped);
        }
    }
}

#[test]
fn snapshots_of_the_backing_keep_their_content() {
    for bits in [9, 12, 16] {
        for (snapshots, ancestor) in [(1, false), (3, true)] {
            let size = 300u64 << bits;
            // It ends within a cluster, where clusters are larger than a sector.
            let end = size - (1 << bits) / 1024 * 512;
            let overlay = Spec::new(bits, end).with(data([0, 1, 2, 150, 298, 299], 0x40)).with([
                (3, State::Zero),
                (4, State::Zero),
                (5, State::ZeroAllocated(1)),
                (6, State::Zero),
            ]);
            let mut backing = Spec::new(bits, size).with(data([1, 2, 3, 151, 299], 0x80));
            backing.clusters.extend([(0, State::ZeroAllocated(9)), (4, State::ZeroAllocated(8)), (150, State::Zero)]);
            backing.snapshots = snapshots;
            let mut pair = Pair::new(&overlay, &backing);
            pair.ancestor = ancestor.then(|| build(&Spec::new(bits, size).with(data(0..300, 0x77))));
            commit_and_verify(&pair);
            if bits == 9 {
                verify_crashes(&pair);
            }
            // In version 2 without the flag, and with partial clusters of another size.
            overlay_of_other_size(bits, &backing);
        }
    }
}

fn overlay_of_other_size(bits: u32, backing: &Spec) {
    for top in [bits - 1, bits + 2] {
        if (9..=21).contains(&top) {
            let overlay = Spec::new(top, backing.virtual_size).with(data([0, 3, 7, 20], 0x21)).with([(2, State::Zero)]);
            commit_and_verify(&Pair::new(&overlay, backing));
        }
    }
}

#[test]
fn snapshots_of_the_overlay_keep_their_clusters() {
    for (bits, snapshots) in [(9, 1), (9, 3), (12, 2), (16, 1)] {
        let size = 300u64 << bits;
        let mut overlay = Spec { table_clusters: 4, ..Spec::new(bits, size) }
            .with(data([0, 1, 2, 150, 298, 299], 0x40))
            .with([(3, State::Zero), (4, State::Zero), (5, State::ZeroAllocated(1))]);
        overlay.snapshots = snapshots;
        let backing = Spec::new(bits, size).with(data([1, 2, 3, 151, 299], 0x80));
        let pair = Pair::new(&overlay, &backing);
        commit_and_verify(&pair);
        if bits == 9 {
            verify_crashes(&pair);
        }
    }
}

#[test]
fn compressed_clusters_on_both_sides_with_snapshots() {
    for (bits, snapshots) in [(9, 0), (9, 2), (12, 1), (16, 2)] {
        let size = 300u64 << bits;
        let deflated =
            |clusters: &[u64], seed| clusters.iter().map(move |&c| (c, State::Deflated(seed))).collect::<Vec<_>>();
        let mut overlay = Spec { table_clusters: 4, ..Spec::new(bits, size) }
            .with(data([0, 1, 2, 150], 0x40))
            .with(deflated(&[3, 4, 5, 100, 101, 102], 0x55))
            .with([(6, State::Zero)]);
        let mut backing = Spec::new(bits, size).with(deflated(&[0, 4, 6, 7, 8, 150, 151], 0x66)).with(data([5], 9));
        for side in [&mut overlay, &mut backing] {
            side.snapshots = snapshots;
        }
        let pair = Pair::new(&overlay, &backing);
        commit_and_verify(&pair);
        if bits == 9 {
            verify_crashes(&pair);
        }
        // Parts of compressed clusters stay.
        if bits > 9 {
            let small = Spec { table_clusters: 4, ..Spec::new(9, size) }.with(data([0, 1, 33, (4 << bits) >> 9], 0x40));
            commit_and_verify(&Pair::new(&small, &backing));
        }
    }
}
