//! A sink that compresses what arrives.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{device_flags, Phase, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};
use instar_guest_sdk::{Content, Extent, ReadBelow, Sink};
use instar_qcow2_driver::Qcow2;
use instar_qcow2_testkit::bitmaps::BitmapSpec;
use instar_qcow2_testkit::builder::{build, mixed, Spec, State};
use instar_qcow2_testkit::checker::{check, content, Report, View};
use instar_qcow2_testkit::config;
use instar_qcow2_testkit::pair::{commit_and_verify, data, verify_crashes, Pair};

/// Well and badly compressible clusters in turns.
fn various(clusters: impl IntoIterator<Item = u64>) -> Vec<(u64, State)> {
    clusters.into_iter().map(|c| (c, State::Deflated([0x10, 0xb1, 0x52][c as usize % 3]))).collect()
}

fn compressing(overlay: &Spec, backing: &Spec) -> Pair {
    Pair { compress: true, ..Pair::new(overlay, backing) }
}

/// The entries of an image that are compressed, and the others that refer to a host cluster.
fn kinds(bytes: &[u8]) -> (usize, usize) {
    let entries = View::new(bytes).entries();
    let compressed = entries.iter().filter(|(_, entry, _)| entry >> 62 & 1 != 0).count();
    let plain =
        entries.iter().filter(|(_, entry, _)| entry >> 62 & 1 == 0 && entry & 0x00ff_ffff_ffff_fe00 != 0).count();
    (compressed, plain)
}

#[test]
fn every_cluster_size_and_version() {
    for bits in 9..=21 {
        for (top, base) in [(3, 3), (2, 3), (3, 2)] {
            // The last cluster is cut where it is larger than a sector.
            let size = (40 << bits) - if bits > 9 { 512 } else { 0 };
            let overlay = Spec::new(bits, size).version(top).with(various([0, 1, 2, 3, 4, 7, 20, 39]));
            let overlay = overlay.with(data([5, 8], 0x21)).with((top == 3).then_some((9, State::Zero)));
            let backing = Spec::new(bits, size + 512).version(base).with(data([1, 7, 8, 9], 0x80));
            let io = commit_and_verify(&compressing(&overlay, &backing));
            let (compressed, plain) = kinds(&io.files[&DEVICE_OUTPUT]);
            assert!(compressed >= 8 && compressed + plain >= 10, "{bits}: {compressed} and {plain}");
        }
    }
}

#[test]
fn streams_share_host_clusters_and_straddle_them() {
    for extended in [false, true] {
        let overlay = Spec::new(14, 400 << 14).with(various(0..300));
        let io = commit_and_verify(&compressing(&overlay, &Spec { extended, ..Spec::new(14, 400 << 14) }));
        let bytes = &io.files[&DEVICE_OUTPUT];
        let view = View::new(bytes);
        let ranges: Vec<(u64, u64)> = view.entries().iter().map(|&(_, entry, _)| view.compressed(entry)).collect();
        assert_eq!(kinds(bytes), (300, 0));
        assert!(ranges.iter().any(|&(first, end)| first >> 14 != (end - 1) >> 14), "none straddles");
        assert!((0..bytes.len() as u64 >> 14).any(|cluster| view.refcount(cluster) > 2), "none shares");
        // Streams follow each other without a gap, but for those that begin behind a table.
        let gaps = ranges.windows(2).filter(|pair| pair[1].0.abs_diff(pair[0].1) > 512).count();
        assert!(gaps < 4, "{gaps} gaps");
        let flushes = io.log.iter().filter(|change| matches!(change, Change::Flush { .. })).count();
        assert!(flushes < 20, "{flushes} flushes");
        assert!(io.submits < 100, "{} submits", io.submits);
    }
}

#[test]
fn what_does_not_shrink_is_stored_as_it_is() {
    let overlay = Spec::new(12, 64 << 12).with(data(0..40, 0x21));
    let mut pair = compressing(&overlay, &Spec::new(12, 64 << 12));
    let entries = View::new(&pair.overlay).entries();
    let mut random = Random::seeded(7);
    for (_, entry, _) in entries.iter().filter(|(cluster, ..)| cluster % 10 != 3) {
        let at = (entry & 0x00ff_ffff_ffff_fe00) as usize;
        pair.overlay[at..at + 4096].iter_mut().for_each(|byte| *byte = random.byte());
    }
    let io = commit_and_verify(&pair);
    assert_eq!(kinds(&io.files[&DEVICE_OUTPUT]), (4, 36));
}

#[test]
fn refcounts_of_every_width() {
    for refcount_order in 0..=6 {
        let overlay = Spec::new(12, 300 << 12).with(various(0..200));
        let io = commit_and_verify(&compressing(&overlay, &Spec { refcount_order, ..Spec::new(12, 300 << 12) }));
        let bytes = &io.files[&DEVICE_OUTPUT];
        assert_eq!(kinds(bytes).0, 200);
        let most = (0..bytes.len() as u64 >> 12).map(|cluster| View::new(bytes).refcount(cluster)).max().unwrap();
        assert!(most < 1 << (1u64 << refcount_order).min(16), "{most}");
    }
}

#[test]
fn what_is_there_already_is_replaced_and_given_back() {
    for extended in [false, true] {
        let bits = 14;
        let overlay = Spec::new(bits, 64 << bits).with(various(0..32)).with([(40, State::Zero), (41, State::Zero)]);
        let kept = if extended { State::Mixed(7, 0xff, 0xff00) } else { State::ZeroAllocated(7) };
        let backing = Spec { extended, snapshots: 1, ..Spec::new(bits, 64 << bits) };
        let backing = backing.with(data([0, 1, 2, 40], 0x80)).with(various([5, 6, 7, 41])).with([(10, kept)]);
        commit_and_verify(&compressing(&overlay, &backing));
        commit_and_verify(&compressing(&overlay, &Spec { snapshots: 0, ..backing.clone() }));
        let ancestor = Spec::new(bits, 64 << bits).with(data(0..64, 0x33));
        let below = Some(build(&ancestor));
        commit_and_verify(&Pair { ancestor: below.clone(), ..compressing(&overlay, &backing) });
        // Small clusters fill a part of large ones.
        for top in [9, 12] {
            let clusters = (0..64 << (bits - top)).filter(|c| c % 5 < 2);
            let small = Spec::new(top, 64 << bits).with(data(clusters, 0x44));
            commit_and_verify(&compressing(&small, &backing));
            commit_and_verify(&Pair { ancestor: below.clone(), ..compressing(&small, &backing) });
        }
    }
}

#[test]
fn bitmaps_record_what_arrives() {
    let overlay = Spec::new(12, 64 << 12).with(various([0, 1, 2, 20]));
    let bitmaps = vec![BitmapSpec::new(2, 12, &[]), BitmapSpec::new(2, 16, &[])];
    commit_and_verify(&compressing(&overlay, &Spec { bitmaps, ..Spec::new(12, 64 << 12) }));
}

#[test]
fn a_device_keeps_its_length() {
    let overlay = Spec::new(12, 300 << 12).with(various(0..200));
    let pair = compressing(&overlay, &Spec::new(12, 300 << 12).with(data([1, 2], 0x80)));
    let length = pair.backing.len() + (300 << 12);
    let io = commit_and_verify(&pair.on_device(length));
    assert_eq!(kinds(&io.files[&DEVICE_OUTPUT]).0, 200);
}

#[test]
fn the_same_bytes_give_the_same_image() {
    let overlay = Spec::new(12, 300 << 12).with(various(0..200)).with(data(210..220, 3));
    let make = || commit_and_verify(&compressing(&overlay, &Spec::new(12, 300 << 12))).files[&DEVICE_OUTPUT].clone();
    assert!(make() == make());
}

#[test]
fn every_crash() {
    for extended in [false, true] {
        let bits = if extended { 14 } else { 12 };
        let overlay = Spec::new(bits, 40 << bits).with(various(0..20)).with([(30, State::Zero)]);
        let backing = Spec { extended, ..Spec::new(bits, 40 << bits) };
        verify_crashes(&compressing(&overlay, &backing));
        let used = backing.with(data([0, 1, 30], 0x80)).with(various([5, 6, 7]));
        verify_crashes(&compressing(&overlay, &used));
        verify_crashes(&compressing(&overlay, &Spec { snapshots: 1, ..used }));
    }
}

struct Below(u8);

impl ReadBelow for Below {
    fn exists(&self) -> bool {
        self.0 != 0
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: u64, buffer: &mut [u8]) -> DriverResult<()> {
        buffer.fill(self.0);
        Ok(())
    }
}

/// A cluster arrives in several calls: it is compressed once, and reads as all of them say.
#[test]
fn a_cluster_that_arrives_in_pieces_is_compressed_once() {
    for (below, bits) in [(0u8, 16u32), (0x5a, 16), (0, 21)] {
        let size = 1u64 << bits;
        let bytes = build(&Spec::new(bits, 4 * size));
        let mut io = MemoryDevices::new([(0, Vec::new()), (DEVICE_OUTPUT, bytes)]);
        let mut device = config(&io, DEVICE_OUTPUT);
        device.flags |= device_flags::COMPRESS;
        let mut sink = Qcow2::open_sink(&mut io, &device, below != 0).unwrap();
        let pieces: Vec<(u64, Vec<u8>)> = (0..50)
            .map(|i| (size / 2 + i * (size / 32), mixed(0xe0, i, 512)))
            .filter(|(at, _)| at % size != 0)
            .collect();
        let mut expected = vec![below; 4 * size as usize];
        let extents: Vec<Extent> = pieces
            .iter()
            .map(|(at, bytes)| {
                expected[*at as usize..][..512].copy_from_slice(bytes);
                Extent { guest_offset: *at, length: 512, content: Content::Memory { address: bytes.as_ptr() as u64 } }
            })
            .collect();
        extents.iter().for_each(|extent| sink.plan(&mut io, core::slice::from_ref(extent)).unwrap());
        sink.planned(&mut io).unwrap();
        io.enter(Phase::Target);
        for extent in &extents {
            sink.write(&mut io, core::slice::from_ref(extent), &mut Below(below)).unwrap();
        }
        sink.finish(&mut io).unwrap();
        let image = &io.files[&DEVICE_OUTPUT];
        assert_eq!(check(image), Report::default());
        let shown = vec![below; 4 * size as usize];
        assert!(content(image, (below != 0).then_some(&shown)) == expected, "{below}, {bits}");
        assert_eq!(kinds(image), (3, 0));
        // Three clusters of a few sectors each.
        let host: u64 =
            View::new(image).entries().iter().map(|e| View::new(image).compressed(e.1)).map(|r| r.1 - r.0).sum();
        assert!(host < 60_000, "{host}");
    }
}
