//! Refcounts that are lower than the number of references: refused before anything changes, wherever the other reference is.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Step;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{Extent, FormatDriver, Sink};
use instar_qcow2_driver::Qcow2;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::checker::View;
use instar_qcow2_testkit::pair::{commit_and_verify, data, Pair};
use instar_qcow2_testkit::{be64, config};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const BITS: u32 = 12;

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// Where the L2 entry of a guest cluster of the first table stands.
fn entry_at(bytes: &[u8], guest: u64) -> u64 {
    (be64(bytes, be64(bytes, 40) as usize) & OFFSET) + guest * 8
}

fn entry(bytes: &[u8], guest: u64) -> u64 {
    be64(bytes, entry_at(bytes, guest) as usize)
}

/// Set the 16-bit refcount of the cluster at an offset, which block 0 describes.
fn set_refcount(bytes: &mut [u8], offset: u64, count: u16) {
    let block = be64(bytes, be64(bytes, 48) as usize) as usize;
    let at = block + (offset >> BITS) as usize * 2;
    bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
}

/// Commit, expect this refusal, and that nothing was changed.
fn refused(pair: &Pair, code: ErrorCode, word: &str) {
    let mut io = pair.io();
    let failure = pair.commit(&mut io).unwrap_err();
    assert!(failure.error.code == code && failure.error.text.contains(word), "{}", failure.error);
    assert!(matches!(failure.step, Step::Check | Step::Plan));
    assert_eq!(io.log, vec![], "something was changed");
}

/// Compressed clusters that the overlay shares with its snapshots: every reference counts.
#[test]
fn compressed_clusters_of_an_overlay_with_snapshots() {
    for snapshots in [1, 2] {
        let overlay = Spec { snapshots, ..Spec::new(BITS, 64 << BITS) };
        let overlay = overlay.with((0..12).map(|guest| (guest, State::Deflated(0x10))));
        let whole = Pair::new(&overlay, &Spec::new(BITS, 64 << BITS).with(data([3], 0x80)));
        commit_and_verify(&whole);
        let view = View::new(&whole.overlay);
        let host = view.compressed(entry(&whole.overlay, 0)).0 & OFFSET >> BITS << BITS;
        let right = view.refcount(host >> BITS) as u16;
        assert!(right > 2 * (snapshots as u16 + 1), "the clusters stand alone");
        for count in [right - 1, right / (snapshots as u16 + 1), 1] {
            let mut pair = Pair { overlay: whole.overlay.clone(), ..Pair::new(&overlay, &Spec::new(BITS, 64 << BITS)) };
            set_refcount(&mut pair.overlay, host, count);
            refused(&pair, ErrorCode::OverlayCorrupt, "references");
        }
        // More than there are is a leak.
        let mut pair = whole;
        set_refcount(&mut pair.overlay, host, right + 1);
        let mut io = pair.io();
        assert!(pair.commit(&mut io).is_ok());
    }
}

/// Plain clusters and tables likewise, and what only snapshots refer to.
#[test]
fn plain_clusters_of_an_overlay_with_snapshots() {
    let overlay = Spec { snapshots: 2, ..Spec::new(BITS, 64 << BITS) }.with(data([1, 2], 7));
    let whole = build(&overlay);
    let table = be64(&whole, be64(&whole, 40) as usize) & OFFSET;
    for offset in [entry(&whole, 1) & OFFSET, table] {
        let mut pair = Pair::new(&overlay, &Spec::new(BITS, 64 << BITS));
        set_refcount(&mut pair.overlay, offset, 2);
        refused(&pair, ErrorCode::OverlayCorrupt, "3 references but refcount 2");
    }
    // The active state has lost its table: only the snapshots are left, and are not counted.
    let mut pair = Pair::new(&overlay, &Spec::new(BITS, 64 << BITS));
    let l1 = be64(&pair.overlay, 40);
    put(&mut pair.overlay, l1, 0);
    set_refcount(&mut pair.overlay, entry(&whole, 1) & OFFSET, 0);
    refused(&pair, ErrorCode::OverlayCorrupt, "2 references but refcount 0");
}

/// A few bytes that many entries refer to would become as many clusters.
#[test]
fn one_compressed_cluster_of_many_entries() {
    let overlay = Spec::new(BITS, 600 << BITS).with([(0, State::Deflated(0x10))]);
    let mut pair = Pair::new(&overlay, &Spec::new(BITS, 600 << BITS));
    let descriptor = entry(&pair.overlay, 0);
    for guest in 1..500 {
        let at = entry_at(&pair.overlay, guest);
        put(&mut pair.overlay, at, descriptor);
    }
    refused(&pair, ErrorCode::OverlayCorrupt, "500 references but refcount 1");
    // The refcounts allow it: that is what the plan is for.
    let host = View::new(&pair.overlay).compressed(descriptor).0 >> BITS << BITS;
    set_refcount(&mut pair.overlay, host, 500);
    let mut io = pair.io();
    let mut source = Qcow2::open_source(&mut io, &config(&pair.io(), 0)).unwrap();
    let mut sink = Qcow2::open_sink(&mut io, &config(&pair.io(), DEVICE_OUTPUT), false).unwrap();
    let mut images = instar_guest_commit::Commit {
        source: &mut source,
        sink: &mut sink,
        below: &mut instar_guest_view::Ancestors::new(Vec::new()),
    };
    let mut encoded = 0;
    instar_guest_commit::commit(&mut io, &mut images, pair.options(), &mut |event| {
        if let instar_guest_commit::Event::Planned(plan) = event {
            (encoded, _) = (plan.encoded_bytes, assert_eq!(plan.sink.new_data_clusters, 500));
        }
    })
    .unwrap();
    assert_eq!(encoded, 500 << BITS);
}

/// Another entry, which the commit does not touch, refers to what it would change.
#[test]
fn two_entries_on_one_cluster_of_the_backing() {
    let spec = |snapshots| {
        let spec = Spec { snapshots, ..Spec::new(BITS, 1100 << BITS) };
        spec.with(data([1, 2, 20, 600], 0x80)).with([(30, State::Deflated(0x10)), (31, State::ZeroAllocated(5))])
    };
    // In place, over a zero cluster, over a compressed one, and to be freed.
    let cases: [(u64, State); 4] = [(2, State::Data(1)), (31, State::Data(2)), (30, State::Data(3)), (2, State::Zero)];
    for snapshots in [0, 1] {
        for (guest, state) in cases {
            let pair = || Pair::new(&Spec::new(BITS, 1100 << BITS).with([(guest, state)]), &spec(snapshots));
            commit_and_verify(&pair());
            // The other entry: plain, zero with a cluster, far away in another table, or compressed.
            let (first, far) = (pair().backing, 600 % 512);
            let second_table = be64(&first, be64(&first, 40) as usize + 8) & OFFSET;
            let target = entry(&first, guest);
            let host = if target & (1 << 62) != 0 {
                View::new(&first).compressed(target).0 >> BITS << BITS
            } else {
                target & OFFSET
            };
            let flags = if snapshots == 0 { 1 << 63 } else { 0 };
            let others = [
                (entry_at(&first, 20), host | flags),
                (entry_at(&first, 40), host | flags | 1),
                (second_table + far * 8, host | flags),
                (entry_at(&first, 41), host | 1 << 62),
            ];
            for (at, other) in others {
                let mut pair = pair();
                put(&mut pair.backing, at, other);
                refused(&pair, ErrorCode::BackingCorrupt, "refcount");
            }
        }
    }
}

/// An entry that the commit does not touch takes a table for data, or refers to what new data would be put into.
#[test]
fn entries_on_metadata_and_on_what_is_new() {
    let spec = Spec::new(BITS, 64 << BITS).with(data([1, 2], 0x80));
    let whole = build(&spec);
    let overlay = Spec::new(BITS, 64 << BITS).with(data([1, 9], 0x40));
    let metadata =
        [0, be64(&whole, 40), be64(&whole, 48), be64(&whole, be64(&whole, 48) as usize), entry_at(&whole, 0)];
    for offset in metadata {
        let mut pair = Pair::new(&overlay, &spec);
        put(&mut pair.backing, entry_at(&whole, 40), offset | 1 << 63);
        if offset != 0 {
            refused(&pair, ErrorCode::BackingCorrupt, "metadata");
        }
    }
    // Past the end of the file, where it reads as zeroes now.
    let mut pair = Pair::new(&overlay, &spec);
    put(&mut pair.backing, entry_at(&whole, 40), whole.len() as u64 | 1 << 63);
    refused(&pair, ErrorCode::BackingCorrupt, "past the end");
}

/// A snapshot and the active state have one L2 table, whose refcount knows of one.
#[test]
fn tables_that_a_snapshot_shares() {
    let spec = Spec { snapshots: 1, ..Spec::new(BITS, 64 << BITS) }.with(data([1, 2], 0x80));
    let mut pair = Pair::new(&Spec::new(BITS, 64 << BITS).with(data([1], 0x40)), &spec);
    let l1 = be64(&pair.backing, 40);
    let table = be64(&pair.backing, l1 as usize) & OFFSET;
    put(&mut pair.backing, l1, table | 1 << 63);
    set_refcount(&mut pair.backing, table, 1);
    for guest in [1, 2] {
        let (at, host) = (entry_at(&pair.backing, guest), entry(&pair.backing, guest) & OFFSET);
        put(&mut pair.backing, at, host | 1 << 63);
        set_refcount(&mut pair.backing, host, 1);
    }
    refused(&pair, ErrorCode::BackingCorrupt, "2 references but refcount 1");
}

/// Plan a small commit into a backing with `tables` L2 tables; returns how many of them were not read.
fn unread(tables: u64, snapshots: usize, clusters: u64) -> u64 {
    let per_table = 8192;
    let spec = Spec { snapshots, ..Spec::new(16, (tables * per_table) << 16) };
    let backing = build(&spec.with((0..tables).map(|table| (table * per_table, State::Zero))));
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, backing)]);
    let device = config(&io, DEVICE_OUTPUT);
    let mut sink = Qcow2::open_sink(&mut io, &device, false).unwrap();
    let extent = Extent::data(1 << 16, clusters << 16, 0, 0);
    sink.plan(&mut io, &[extent]).unwrap();
    sink.planned(&mut io).unwrap().unread_tables
}

/// Reading all tables must not cost more than the commit, but snapshots are worth it.
#[test]
fn tables_are_read_where_that_is_cheap() {
    assert_eq!(unread(128, 0, 1), 0);
    assert_eq!(unread(129, 0, 1), 129);
    assert_eq!(unread(129, 0, 129), 0);
    assert_eq!(unread(129, 1, 1), 0);
}

/// A count that is too high, as a power loss while a snapshot is deleted leaves it: what it is of counts as shared, and is
/// copied. `qemu-img commit` does the same.
#[test]
fn what_has_a_leaked_reference_is_copied() {
    for shares_table in [false, true] {
        let backing = Spec::new(BITS, 64 << BITS).with(data([3, 4], 0x21));
        let mut pair = Pair::new(&Spec::new(BITS, 64 << BITS).with(data([3], 0x77)), &backing);
        let bytes = &mut pair.backing;
        let l1 = be64(bytes, 40);
        let mut shared = vec![entry_at(bytes, 3)];
        if shares_table {
            shared.extend([entry_at(bytes, 4), l1]);
        }
        for at in shared {
            let offset = be64(bytes, at as usize) & OFFSET;
            put(bytes, at, offset);
            set_refcount(bytes, offset, 2);
        }
        let kept = (entry(bytes, 3) & OFFSET) as usize;
        let io = commit_and_verify(&pair);
        let range = kept..kept + (1 << BITS);
        assert_eq!(io.files[&DEVICE_OUTPUT][range.clone()], pair.backing[range], "written in place");
    }
}
