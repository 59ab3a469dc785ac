//! A backing that grows to the size of a larger overlay: content, consistency, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::{FormatDriver, Sink};
use instar_qcow2_driver::Qcow2;
use instar_qcow2_testkit::builder::{build, pattern, Spec, State};
use instar_qcow2_testkit::checker::View;
use instar_qcow2_testkit::pair::{commit_and_verify, data, verify_crashes, Pair};
use instar_qcow2_testkit::{be32, be64, config, run_commit, ANCESTOR, OVERLAY};

const MANY: u64 = 4096;

fn growing(overlay: &Spec, backing: &Spec) -> Pair {
    Pair { resize: true, ..Pair::new(overlay, backing) }
}

fn over(ancestor: &Spec, mut pair: Pair) -> Pair {
    pair.ancestor = Some(build(ancestor));
    pair
}

/// Commit; the backing must then be as large as the overlay. Then every crash.
fn grows(pair: &Pair) -> Vec<u8> {
    let io = commit_and_verify(pair);
    let size = be64(&pair.overlay, 24);
    assert_eq!(be64(&io.files[&DEVICE_OUTPUT], 24), size);
    verify_crashes(pair);
    verify_nothing_past_the_end(pair);
    io.files[&DEVICE_OUTPUT].clone()
}

/// No crash leaves data past the end of the backing, and once it has grown, a commit needs no option any more.
fn verify_nothing_past_the_end(pair: &Pair) {
    let mut io = pair.io();
    run_commit(&mut io, pair.options()).unwrap();
    let mut files = pair.io().files;
    for change in &io.log {
        change.apply(&mut files);
        let backing = &files[&DEVICE_OUTPUT];
        let view = View::new(backing);
        let clusters = view.virtual_size.div_ceil(view.size);
        for (guest, entry, bitmap) in view.entries() {
            let zero = entry <= 1 && bitmap & 0xffff_ffff == 0;
            assert!(guest < clusters || zero, "guest cluster {guest} of {clusters}: entry {entry:x}");
        }
        if view.virtual_size == be64(&pair.overlay, 24) {
            let mut again = MemoryDevices::new(files.clone());
            run_commit(&mut again, Options::default()).unwrap();
        }
    }
}

fn refused(pair: &Pair, code: ErrorCode, word: &str) {
    let mut io = pair.io();
    let failure = run_commit(&mut io, pair.options()).unwrap_err();
    assert_eq!(failure.error.code, code, "{}", failure.error);
    assert!(failure.error.text.contains(word), "{:?} lacks {word:?}", failure.error.text);
    assert_eq!(io.log, vec![], "something was changed");
}

fn fill_after(bytes: &mut [u8], from: u64, to: u64) {
    bytes[from as usize..to as usize].fill(0xee);
}

#[test]
fn every_cluster_size_and_version() {
    for bits in 9..=21 {
        for (top, base) in [(3, 3), (2, 2), (2, 3), (3, 2)] {
            let overlay = Spec::new(bits, 40 << bits).version(top).with(data([0, 1, 9, 10, 39], 0x40));
            let backing = Spec::new(bits, 10 << bits).version(base).with(data([1, 7, 9], 0x80));
            let pair = growing(&overlay, &backing);
            commit_and_verify(&pair);
            if bits == 9 {
                grows(&pair);
            }
        }
    }
}

#[test]
fn within_the_same_l1_table() {
    // One L1 entry maps 64 clusters of 512 bytes.
    let overlay = Spec::new(9, 60 << 9).with(data([0, 20, 59], 0x21)).with([(30, State::Zero)]);
    let backing = Spec::new(9, 10 << 9).with(data([1, 9], 0x43));
    let l1 = be64(&build(&backing), 40);
    let after = grows(&growing(&overlay, &backing));
    assert_eq!((be32(&after, 36), be64(&after, 40)), (1, l1));
}

#[test]
fn within_the_same_l1_cluster() {
    let overlay = Spec::new(9, 700 << 9).with(data([0, 20, 300, 699], 0x21)).with([(500, State::Zero)]);
    let backing = Spec::new(9, 10 << 9).with(data([1, 9], 0x43));
    let mut pair = growing(&overlay, &backing);
    let l1 = be64(&pair.backing, 40);
    let after = grows(&pair);
    assert_eq!((be32(&after, 36), be64(&after, 40)), (11, l1));
    // What stands behind the table is not believed.
    fill_after(&mut pair.backing, l1 + 8, l1 + 512);
    let after = grows(&pair);
    assert_eq!((be32(&after, 36), be64(&after, 40)), (11, l1));
}

#[test]
fn with_a_new_l1_table() {
    // 64 entries are a cluster, 64 clusters an entry.
    for (from, to) in [(64 * 64, 64 * 65), (10, 64 * 200 + 1)] {
        let overlay = Spec::new(9, to << 9).with(data([0, 20, to - 2, to - 1], 0x21));
        let backing = Spec { table_clusters: 2, ..Spec::new(9, from << 9) }.with(data([1, from - 1], 0x43));
        let pair = growing(&overlay, &backing);
        let l1 = be64(&pair.backing, 40);
        let after = grows(&pair);
        assert_eq!(u64::from(be32(&after, 36)), to.div_ceil(64));
        assert_ne!(be64(&after, 40), l1);
    }
}

#[test]
fn an_overlay_that_holds_nothing_makes_it_grow() {
    for to in [20, 700, 64 * 200] {
        let backing = Spec::new(9, 10 << 9).with(data([1, 9], 0x43));
        grows(&growing(&Spec::new(9, to << 9), &backing));
    }
}

#[test]
fn a_backing_of_no_size() {
    for to in [1, 700, 64 * 200] {
        let overlay = Spec::new(9, to << 9).with(data([0, to - 1], 0x43));
        let mut pair = growing(&overlay, &Spec::new(9, 0));
        grows(&pair);
        // As qemu-img makes it: without an L1 table. Its cluster is leaked here.
        pair.backing[36..40].fill(0);
        let mut io = pair.io();
        run_commit(&mut io, pair.options()).unwrap();
        assert_eq!(be64(&io.files[&DEVICE_OUTPUT], 24), to << 9);
    }
}

#[test]
fn an_l1_table_longer_than_what_a_refcount_block_describes() {
    // Refcounts of 64 bits: a block describes 64 clusters. The L1 table takes 80.
    let to = 64 * 64 * 80u64;
    for leaks in [0, 30, 63 * 64 - 5] {
        let overlay = Spec { table_clusters: 2, ..Spec::new(9, to << 9) }.with(data([0, to - 1], 0x21));
        let backing =
            Spec { refcount_order: 6, leaks, table_clusters: 2, ..Spec::new(9, 10 << 9) }.with(data([1, 9], 0x43));
        let io = commit_and_verify(&growing(&overlay, &backing));
        assert_eq!(u64::from(be32(&io.files[&DEVICE_OUTPUT], 36)), to / 64);
    }
    // The refcount table of one cluster describes 64 * 64 clusters: it grows with the L1 table.
    for leaks in [MANY - 100, MANY - 70, MANY - 66] {
        let overlay = Spec { table_clusters: 2, ..Spec::new(9, to << 9) }.with(data([0, to - 1], 0x21));
        let backing = Spec { refcount_order: 6, leaks: leaks - 20, ..Spec::new(9, 10 << 9) }.with(data([1, 9], 0x43));
        let io = commit_and_verify(&growing(&overlay, &backing));
        assert!(be32(&io.files[&DEVICE_OUTPUT], 56) > 1, "the refcount table did not grow");
    }
}

#[test]
fn crashes_while_l1_table_and_refcount_table_grow() {
    // 64 blocks of 64 clusters; the file ends before, at and after the last one that the table can describe.
    for leaks in [MANY - 74, MANY - 73, MANY - 71, MANY - 70] {
        let overlay = Spec::new(9, (64 * 70) << 9).with(data([0, 64 * 69], 0x21));
        let backing = Spec { refcount_order: 6, leaks, ..Spec::new(9, 10 << 9) }.with(data([1, 9], 0x43));
        let after = grows(&growing(&overlay, &backing));
        assert!(be32(&after, 56) > 1, "the refcount table did not grow");
    }
}

#[test]
fn leaked_clusters_past_the_end_of_the_file_are_passed_over() {
    let overlay = Spec::new(9, (64 * 200) << 9).with(data([0, 20], 0x21));
    let backing = Spec::new(9, 10 << 9).with(data([1, 9], 0x43));
    let plain = growing(&overlay, &backing);
    for leak in [0, 1, 5, 30] {
        let mut pair = growing(&overlay, &backing);
        let cluster = (pair.backing.len() as u64 >> 9) + leak;
        let block = be64(&pair.backing, be64(&pair.backing, 48) as usize);
        pair.backing[(block + cluster * 2) as usize + 1] = 1;
        let mut io = pair.io();
        run_commit(&mut io, pair.options()).unwrap();
        let (backing, _) = instar_qcow2_testkit::pair::views(&io.files);
        assert!(backing == instar_qcow2_testkit::pair::expected(&plain).0);
        assert_eq!(instar_qcow2_testkit::checker::check(&io.files[&DEVICE_OUTPUT]).errors, Vec::<String>::new());
    }
}

/// States of the last cluster of a backing that ends within it.
fn last_states() -> [Option<State>; 5] {
    [None, Some(State::Data(0x55)), Some(State::Zero), Some(State::ZeroAllocated(9)), Some(State::Deflated(0x44))]
}

#[test]
fn unaligned_sizes_on_both_sides_with_garbage_past_the_end() {
    for last in last_states() {
        for (from, to) in [((4 << 12) + 1536, (9 << 12) + 512), ((4 << 12) + 1536, (4 << 12) + 2048), (700, 4 << 12)] {
            for holds in [None, Some(State::Data(7)), Some(State::Zero)] {
                for ancestor in [None, Some(3 << 12), Some((4 << 12) + 1800), Some(8 << 12)] {
                    let cluster = from >> 12;
                    let overlay = Spec::new(12, to).with(holds.map(|state| (cluster, state)));
                    // The pattern of a cluster goes on past the end of the disk: that is the garbage.
                    let backing = Spec::new(12, from).with(last.map(|state| (cluster, state)));
                    let mut pair = growing(&overlay, &backing);
                    pair.ancestor = ancestor.map(|size| build(&Spec::new(12, size).with(data(0..size >> 12, 0x66))));
                    grows(&pair);
                }
            }
        }
    }
}

#[test]
fn smaller_clusters_of_the_overlay_within_the_last_cluster() {
    for last in last_states() {
        for ancestor in [false, true] {
            let overlay = Spec::new(9, 9 << 12).with(data([33, 36, 38, 40, 70], 0x31)).with([(39, State::Zero)]);
            let backing = Spec::new(12, (4 << 12) + 1536).with(last.map(|state| (4, state)));
            let mut pair = growing(&overlay, &backing);
            pair.ancestor = ancestor.then(|| build(&Spec::new(12, 8 << 12).with(data(0..8, 0x66))));
            grows(&pair);
        }
    }
}

#[test]
fn ancestors_longer_than_the_backing_stay_hidden() {
    for to in [300, 64 * 70] {
        for ancestor_size in [11, 64, 250, 64 * 70, 64 * 80] {
            let overlay = Spec::new(9, to << 9).with(data([0, 12, 200, to - 1], 0x21)).with([(20, State::Zero)]);
            let backing = Spec::new(9, 10 << 9).with(data([1], 0x43));
            let ancestor = Spec { table_clusters: 4, ..Spec::new(9, ancestor_size << 9) }
                .with(data((0..ancestor_size).filter(|c| c % 7 < 3), 0x66));
            let pair = over(&ancestor, growing(&overlay, &backing));
            if to == 300 {
                grows(&pair);
            } else {
                commit_and_verify(&pair);
            }
        }
    }
}

#[test]
fn with_internal_snapshots() {
    for ancestor in [false, true] {
        // The last cluster of the disk is cut, shared with the snapshot, and so is the table that maps it.
        let overlay = Spec::new(10, 300 << 10).with(data([0, 11, 299], 0x21));
        let mut backing = Spec::new(10, (9 << 10) + 512).with(data([1, 9], 0x43)).with([(3, State::ZeroAllocated(1))]);
        backing.snapshots = 2;
        let mut pair = growing(&overlay, &backing);
        pair.ancestor = ancestor.then(|| build(&Spec::new(10, 40 << 10).with(data(0..40, 0x66))));
        grows(&pair);
        pair.backing[7] = 2;
        pair.backing[72..104].fill(0);
        refused(&pair, ErrorCode::UnsupportedFormat, "internal snapshots");
    }
}

#[test]
fn a_file_that_ends_within_the_last_cluster() {
    for (from, overlay_holds) in [(1536, None), (1536, Some((4, State::Data(3)))), (2048, Some((7, State::Data(3))))] {
        let overlay = Spec::new(12, 9 << 12).with(overlay_holds);
        let backing = Spec { blocks_first: true, ..Spec::new(12, (4 << 12) + from) }.with(data([4], 0x43));
        let mut pair = growing(&overlay, &backing);
        // The file ends where the disk ends, in the middle of its last cluster, or after some garbage.
        for keep in [from, from + 100] {
            let whole = build(&backing);
            pair.backing = whole[..whole.len() - 4096 + keep as usize].to_vec();
            grows(&pair);
            verify_crashes(&pair);
        }
        // What a guest could read is lost.
        pair.backing.truncate(pair.backing.len() - 101);
        refused(&pair, ErrorCode::BackingCorrupt, "cut off");
    }
}

#[test]
fn with_extended_l2_entries() {
    let states =
        [None, Some(State::Data(3)), Some(State::Zero), Some(State::Mixed(4, 0xff00, 0xf)), Some(State::MixedZero(9))];
    for last in states {
        // Both end within a subcluster, the ancestor after the backing, or after the overlay.
        let overlay = Spec::new(14, (7 << 14) + 1536).with(data([0, 5], 0x21));
        let mut backing = Spec { extended: true, ..Spec::new(14, (3 << 14) + 512 * 9) }.with(data([1], 0x43));
        backing.clusters.extend(last.map(|state| (3, state)));
        let pair = growing(&overlay, &backing);
        grows(&pair);
        for below in [(5 << 14) + 2048, 9 << 14] {
            grows(&over(&Spec::new(14, below).with(data(0..below >> 14, 0x66)), growing(&overlay, &backing)));
        }
    }
}

#[test]
fn what_cannot_grow_is_refused_before_the_first_change() {
    let overlay = Spec::new(9, 700 << 9).with(data([0, 20], 0x21));
    let backing = Spec::new(9, 10 << 9).with(data([1, 9], 0x43));
    let pair = |change: &dyn Fn(&mut Pair)| {
        let mut pair = growing(&overlay, &backing);
        change(&mut pair);
        pair
    };
    let size = |bytes: &mut Vec<u8>, size: u64| bytes[24..32].copy_from_slice(&size.to_be_bytes());
    let uneven = pair(&|p| size(&mut p.overlay, (650 << 9) + 100));
    refused(&uneven, ErrorCode::UnsupportedFormat, "multiple of 512");
    // Longer ancestors cannot be hidden in version 2, unless in the last cluster.
    let old = Spec { version: 2, ..backing.clone() };
    let ancestor = Spec::new(9, 11 << 9).with(data(0..11, 0x66));
    refused(&over(&ancestor, growing(&overlay, &old)), ErrorCode::UnsupportedFormat, "version 2");
    grows(&over(&Spec::new(9, 10 << 9).with(data(0..10, 0x66)), growing(&overlay, &old)));
    // A data cluster past the end.
    let mapped = Spec::new(9, 20 << 9).with(data([1, 15], 0x43));
    let mut stale = growing(&overlay, &mapped);
    size(&mut stale.backing, 10 << 9);
    refused(&stale, ErrorCode::BackingCorrupt, "past the end of the virtual disk");
    // An L2 table past the end that is none.
    let long = Spec::new(9, 128 << 9).with(data([1, 100], 0x43));
    let mut stale = growing(&overlay, &long);
    size(&mut stale.backing, 10 << 9);
    refused(&stale, ErrorCode::BackingCorrupt, "past the end of the virtual disk");
    let l1 = be64(&stale.backing, 40) as usize;
    stale.backing[l1 + 8..l1 + 16].copy_from_slice(&(1u64 << 63 | 1 << 40).to_be_bytes());
    refused(&stale, ErrorCode::BackingCorrupt, "past the end of the file");
    // Metadata that nobody counts.
    let uncounted = pair(&|p| {
        let block = be64(&p.backing, be64(&p.backing, 48) as usize) as usize;
        p.backing[block..block + 512].fill(0);
    });
    refused(&uncounted, ErrorCode::BackingCorrupt, "refcount 0");
    // Unless the dirty bit says that it was to be expected.
    let mut dirty = uncounted;
    dirty.backing[79] = 1;
    grows(&dirty);
}

#[test]
fn an_l1_table_that_nothing_can_open_is_refused() {
    let pair = growing(&Spec::new(9, 1 << 20), &Spec::new(9, 10 << 9));
    let mut io = pair.io();
    let facts = config(&io, DEVICE_OUTPUT);
    for size in [(4 << 37) + 512, i64::MAX as u64 / 512 * 512, u64::MAX - 511] {
        let mut sink = Qcow2::open_sink(&mut io, &facts, false).unwrap();
        let error = sink.grow(&mut io, size, 0).unwrap_err();
        assert_eq!(error.code, ErrorCode::UnsupportedFormat, "{error}");
    }
    // The largest: 32 MiB of L1 table.
    let mut sink = Qcow2::open_sink(&mut io, &facts, false).unwrap();
    sink.grow(&mut io, 4 << 35, 0).unwrap();
    assert!(sink.planned(&mut io).unwrap().new_metadata_clusters >= 65536);
    assert_eq!(io.log, vec![]);
    // A file that may not become long enough.
    let mut sink = Qcow2::open_sink(&mut io, &DeviceConfig { max_length: 1 << 20, ..facts }, false).unwrap();
    assert!(sink.grow(&mut io, 4 << 35, 0).is_err());
}

#[test]
fn the_new_size_is_written_alone_and_before_any_data() {
    let overlay = Spec::new(9, 700 << 9).with(data([0, 20], 0x21));
    let backing = Spec::new(9, 10 << 9).with(data([1, 9], 0x43));
    let io = commit_and_verify(&growing(&overlay, &backing));
    let at = io.log.iter().position(|c| matches!(c, Change::Write { offset: 24, .. })).unwrap();
    assert_eq!(io.log[at - 1], Change::Flush { device: DEVICE_OUTPUT });
    assert_eq!(io.log[at + 1], Change::Flush { device: DEVICE_OUTPUT });
    let bytes = pattern(0x21, 0, 512);
    let first =
        io.log.iter().position(|c| matches!(c, Change::Write { bytes: b, .. } if b.starts_with(&bytes))).unwrap();
    assert!(at < first);
}

#[test]
fn a_failed_request_leaves_the_overlay_readable_and_running_again_finishes() {
    let overlay = Spec::new(9, (64 * 70) << 9).with(data([0, 12, 64 * 69], 0x21));
    let backing = Spec::new(9, (10 << 9) - 100).with(data([1, 9], 0x43));
    let pair = over(&Spec::new(9, 30 << 9).with(data(0..30, 0x66)), growing(&overlay, &backing));
    let (backing, overlay) = instar_qcow2_testkit::pair::expected(&pair);
    let mut io = pair.io();
    run_commit(&mut io, pair.options()).unwrap();
    for request in 0..io.executed() {
        let mut io = pair.io();
        io.fail_at = Some(request);
        run_commit(&mut io, pair.options()).unwrap_err();
        instar_qcow2_testkit::pair::verify_state(&pair, &io.files, &overlay, &backing);
    }
}

#[test]
fn without_the_option_the_size_stays() {
    let overlay = Spec::new(9, 20 << 9).with(data([0, 9], 0x21));
    let backing = Spec::new(9, 10 << 9).with(data([1, 9], 0x43));
    let pair = Pair::new(&overlay, &backing);
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    assert_eq!(be64(&io.files[&DEVICE_OUTPUT], 24), 10 << 9);
    // And a dry run changes nothing.
    let mut io = pair.io();
    run_commit(&mut io, Options { dry_run: true, resize_backing: true, ..Options::default() }).unwrap();
    assert_eq!(io.log, vec![]);
    assert!(!io.files.contains_key(&ANCESTOR) && io.files.contains_key(&OVERLAY));
}
