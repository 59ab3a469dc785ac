//! Compressed clusters in the overlay and in ancestors.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::checker::View;
use instar_qcow2_testkit::pair::{commit_and_verify, data, expected, verify_crashes, verify_state, Pair};
use instar_qcow2_testkit::{run_commit, OVERLAY};

/// Compressed clusters, well and badly compressible in turns.
fn deflated(clusters: impl IntoIterator<Item = u64>) -> Vec<(u64, State)> {
    clusters.into_iter().map(|c| (c, State::Deflated([0x10, 0xb1, 0x52][c as usize % 3]))).collect()
}

fn flushes(io: &MemoryDevices) -> usize {
    io.log.iter().filter(|change| matches!(change, Change::Flush { .. })).count()
}

#[test]
fn every_cluster_size_and_version() {
    for bits in 9..=21 {
        for (top, base) in [(3, 3), (2, 3), (3, 2)] {
            // The last cluster is cut where it is larger than a sector.
            let size = (40 << bits) - if bits > 9 { 512 } else { 0 };
            let overlay = Spec::new(bits, size).version(top).with(deflated([0, 1, 2, 3, 4, 7, 20, 39]));
            let overlay = overlay.with(data([5, 8], 0x21)).with((top == 3).then_some((9, State::Zero)));
            let backing = Spec::new(bits, size + 512).version(base).with(data([1, 7, 8, 9], 0x80));
            commit_and_verify(&Pair::new(&overlay, &backing));
        }
    }
}

#[test]
fn clusters_share_host_clusters_straddle_them_and_end_with_the_file() {
    let spec = Spec { blocks_first: true, cut: true, ..Spec::new(12, 64 << 12) }.with(deflated(0..40));
    let bytes = build(&spec);
    let view = View::new(&bytes);
    let ranges: Vec<(u64, u64)> = view.entries().iter().map(|&(_, entry, _)| view.compressed(entry)).collect();
    assert!(ranges.iter().any(|&(first, end)| first >> 12 != (end - 1) >> 12), "none straddles");
    assert!((0..bytes.len() as u64 >> 12).any(|cluster| view.refcount(cluster) > 2), "none shares");
    assert!(ranges.iter().any(|&(_, end)| end > bytes.len() as u64), "none is cut at the end of the file");
    let io = commit_and_verify(&Pair::new(&spec, &Spec::new(12, 64 << 12).with(data([3, 4], 0x80))));
    // One batch, however many clusters.
    assert!(flushes(&io) <= 12, "{} flushes", flushes(&io));
}

#[test]
fn many_clusters_take_few_flushes_and_exits() {
    let overlay = Spec { table_clusters: 4, ..Spec::new(12, 20_000 << 12) }.with(deflated(0..20_000));
    let overlay = overlay.with(data((0..200).map(|i| i * 100), 0x21));
    let io = commit_and_verify(&Pair::new(&overlay, &Spec { table_clusters: 4, ..Spec::new(12, 20_000 << 12) }));
    assert!(flushes(&io) < 60, "{} flushes", flushes(&io));
    assert!(io.submits < 800, "{} submits", io.submits);
}

#[test]
fn an_ancestor_shows_through_where_the_overlay_covers_a_part() {
    for (top, base, below) in [(9, 12, 12), (12, 16, 9), (9, 16, 14), (12, 12, 16)] {
        let size = (4u64 << 16) + 1536;
        let mut overlay = Spec::new(top, size).with(data([1], 0x21));
        overlay.clusters.extend(deflated([3, 20]));
        let backing = Spec::new(base, size);
        let mut pair = Pair::new(&overlay, &backing);
        let clusters = (size - 2048) >> below;
        pair.ancestor = Some(build(&Spec::new(below, size - 2048).with(deflated(0..clusters))));
        commit_and_verify(&pair);
    }
}

#[test]
fn crashes_and_failed_requests() {
    let overlay = Spec { blocks_first: true, cut: true, ..Spec::new(9, 100 << 9) };
    let overlay = overlay.with(deflated([0, 1, 2, 5, 63, 64, 99])).with(data([3], 0x21)).with([(6, State::Zero)]);
    let mut pair = Pair::new(&overlay, &Spec::new(10, 50 << 10).with(data([1, 2, 31], 0x43)));
    pair.ancestor = Some(build(&Spec::new(12, 12 << 12).with(deflated(0..12))));
    verify_crashes(&pair);
    let (backing, top) = expected(&pair);
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    for request in 0..io.executed() {
        let mut io = pair.io();
        io.fail_at = Some(request);
        run_commit(&mut io, Options::default()).unwrap_err();
        verify_state(&pair, &io.files, &top, &backing);
    }
}

fn spec(count: u64) -> Spec {
    Spec::new(12, count << 12).with(deflated(0..count - 1)).with(data([count - 1], 0x21))
}

/// Commit an overlay of `count` clusters after a change, and expect the refusal; nothing is changed.
fn refused(count: u64, word: &str, change: impl Fn(&mut Vec<u8>, u64)) {
    refused_as(ErrorCode::OverlayCorrupt, count, word, change);
}

fn refused_as(code: ErrorCode, count: u64, word: &str, change: impl Fn(&mut Vec<u8>, u64)) {
    let mut overlay = build(&spec(count));
    let l1 = instar_qcow2_testkit::be64(&overlay, 40) as usize;
    let l2 = instar_qcow2_testkit::be64(&overlay, l1) & !(1 << 63);
    change(&mut overlay, l2);
    let mut io = MemoryDevices::new([(OVERLAY, overlay), (DEVICE_OUTPUT, build(&Spec::new(12, count << 12)))]);
    let failure = run_commit(&mut io, Options::default()).unwrap_err();
    assert_eq!(failure.error.code, code, "{}", failure.error);
    assert!(failure.error.text.contains(word), "{:?} lacks {word:?}", failure.error.text);
    assert_eq!(io.log, vec![], "something was changed");
}

fn entry(bytes: &[u8], l2: u64, index: u64) -> u64 {
    instar_qcow2_testkit::be64(bytes, (l2 + index * 8) as usize)
}

fn set_entry(bytes: &mut [u8], l2: u64, index: u64, value: impl Fn(&[u8]) -> u64) {
    let value = value(bytes);
    let at = (l2 + index * 8) as usize;
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

#[test]
fn garbage_is_refused_before_anything_is_changed() {
    refused_as(ErrorCode::ParseFailed, 20, "compressed cluster of guest offset 28672", |bytes, l2| {
        let (first, _) = View::new(bytes).compressed(entry(bytes, l2, 7));
        bytes[first as usize..first as usize + 8].fill(0xff);
    });
}

#[test]
fn ranges_that_cannot_be() {
    let compressed = 1 << 62;
    refused(20, "past the end", |b, l2| set_entry(b, l2, 2, |_| compressed | 1 << 40));
    refused(20, "past the end", |b, l2| set_entry(b, l2, 2, |b| compressed | b.len() as u64));
    refused(20, "past the end", |b, l2| set_entry(b, l2, 2, |_| u64::MAX >> 1));
    refused(20, "claims a compressed cluster", |b, l2| set_entry(b, l2, 2, |b| entry(b, l2, 2) | 1 << 63));
    // Header, L2 table, plain data; from either side.
    refused(20, "overlaps", |b, l2| set_entry(b, l2, 2, |_| compressed | 200));
    refused(20, "overlaps", |b, l2| set_entry(b, l2, 2, |_| compressed | (l2 + 100)));
    refused(20, "overlaps", |b, l2| set_entry(b, l2, 2, |b| compressed | ((entry(b, l2, 19) & !(1 << 63)) + 9)));
    refused(20, "overlaps", |b, l2| {
        let (first, _) = View::new(b).compressed(entry(b, l2, 2));
        set_entry(b, l2, 19, |_| 1 << 63 | first & !4095);
    });
    refused(20, "refcount 0", |b, l2| {
        let (first, _) = View::new(b).compressed(entry(b, l2, 2));
        let block = instar_qcow2_testkit::be64(b, instar_qcow2_testkit::be64(b, 48) as usize);
        let at = (block + (first >> 12) * 2) as usize;
        b[at..at + 2].fill(0);
    });
}

#[test]
fn garbage_among_too_many_to_try_leaves_the_overlay_as_it_was() {
    let mut overlay = build(
        &Spec { table_clusters: 2, ..Spec::new(9, 1500 << 9) }
            .with(data([1499], 1))
            .with((0..1499).map(|c| (c, State::Deflated(0x10)))),
    );
    let view = View::new(&overlay);
    let (first, _) = view.compressed(view.entries()[1200].1);
    overlay[first as usize..first as usize + 4].fill(0xff);
    let mut io = MemoryDevices::new([(OVERLAY, overlay.clone()), (DEVICE_OUTPUT, build(&Spec::new(9, 1500 << 9)))]);
    let failure = run_commit(&mut io, Options::default()).unwrap_err();
    assert_eq!(failure.error.code, ErrorCode::ParseFailed);
    assert_eq!(failure.step, instar_guest_commit::Step::Write);
    assert!(io.files[&OVERLAY] == overlay);
}
