//! Persistent bitmaps of the backing: enabled ones record what is committed, others stay as they are.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{Options, Step};
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::random::Random;
use instar_qcow2_testkit::bitmaps::{bitmaps, extension, BitmapSpec, Bits, AUTO, IN_USE};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::pair::{commit_and_verify, data, verify_crashes, Pair};
use instar_qcow2_testkit::{be32, be64, run_commit, OVERLAY};

fn with_bitmaps(spec: Spec, bitmaps: &[BitmapSpec]) -> Spec {
    Spec { bitmaps: bitmaps.to_vec(), autoclear: 1, ..spec }
}

/// One of each kind.
fn kinds(granularity_bits: u32) -> Vec<BitmapSpec> {
    let spec = |flags, bits: &[Bits]| BitmapSpec::new(flags, granularity_bits, bits);
    vec![
        spec(AUTO, &[Bits::None]),
        spec(0, &[Bits::Bytes(0x5a)]),
        spec(AUTO, &[Bits::Bytes(0x81), Bits::None]),
        spec(AUTO | IN_USE, &[Bits::Bytes(0x18), Bits::None]),
        spec(AUTO, &[Bits::All]),
        spec(IN_USE, &[Bits::All]),
        spec(AUTO, &[Bits::None, Bits::All, Bits::Bytes(0)]),
    ]
}

#[test]
fn every_kind_and_granularity() {
    for (bits, granularities) in [(9, 9..=14), (12, 9..=20), (16, 9..=31)] {
        for granularity in granularities {
            let size = 300u64 << bits;
            let overlay = Spec::new(bits, size - (1 << bits) + 512).with(data([0, 1, 5, 64, 150, 299], 0x21)).with([
                (2, State::Zero),
                (3, State::ZeroAllocated(1)),
                (130, State::Zero),
            ]);
            let backing = Spec::new(bits, size).with(data([1, 2, 4, 5, 131], 0x43));
            commit_and_verify(&Pair::new(&overlay, &with_bitmaps(backing, &kinds(granularity))));
        }
    }
}

#[test]
fn every_crash_point() {
    // 4,096 granules of 512 bytes have bits in one cluster; cluster 4,096 has them in another.
    for (granularity, snapshots, clusters) in [(9, 0, 4_100), (9, 1, 200), (16, 0, 200)] {
        let overlay = Spec::new(9, clusters << 9)
            .with(data([0, 1, 64, clusters - 5, clusters - 4], 0x21))
            .with([(2, State::Zero), (clusters - 1, State::Zero)]);
        let mut backing = Spec::new(9, clusters << 9).with(data([1, 2, 64, clusters - 4], 0x43));
        backing.snapshots = snapshots;
        let pair = Pair::new(&overlay, &with_bitmaps(backing, &kinds(granularity)));
        commit_and_verify(&pair);
        verify_crashes(&pair);
    }
}

#[test]
fn crashes_while_bitmaps_make_the_refcount_table_grow() {
    // The table of one cluster describes 16,384 clusters.
    let overlay = Spec::new(9, 8_000 << 9).with(data([0, 4_096], 0x12));
    for leaks in [15_900, 15_980, 16_000] {
        let backing = Spec { leaks, ..Spec::new(9, 8_000 << 9) }.with(data([0, 4_096], 0x90));
        let backing = with_bitmaps(backing, &vec![BitmapSpec::new(AUTO, 9, &[Bits::None]); 150]);
        let pair = Pair::new(&overlay, &backing);
        let io = commit_and_verify(&pair);
        assert!(be32(&io.files[&DEVICE_OUTPUT], 56) > 1, "the refcount table did not grow");
        if leaks == 16_000 {
            let flushes = io.log.iter().filter(|change| matches!(change, Change::Flush { .. })).count();
            assert!(flushes < 30, "{flushes} flushes");
        }
    }
}

/// 4,096 granules of 512 bytes have bits in one cluster; a cluster of a table has 64 entries. A backing of `from`
/// clusters grows to `to` clusters; returns it as a pair.
fn grows(granularity: u32, from: u64, to: u64, snapshots: usize) -> Pair {
    let overlay =
        Spec::new(9, (to << 9) - 512).with(data([0, 5, to - 3], 0x21)).with([(2, State::Zero), (to - 2, State::Zero)]);
    let mut backing = Spec::new(9, (from << 9) - 512).with(data([1, 2, from - 2], 0x43));
    backing.snapshots = snapshots;
    let backing = with_bitmaps(backing, &kinds(granularity));
    let pair = Pair { resize: true, ..Pair::new(&overlay, &backing) };
    let files = commit_and_verify(&pair).files;
    assert_eq!(be64(&files[&DEVICE_OUTPUT], 24), (to << 9) - 512);
    pair
}

#[test]
fn a_backing_that_grows() {
    verify_crashes(&grows(9, 300, 4_000, 0));
}

#[test]
fn a_backing_that_grows_a_little() {
    verify_crashes(&grows(9, 4_096, 4_100, 1));
}

#[test]
fn a_backing_that_grows_past_an_l2_table() {
    verify_crashes(&grows(9, 4_090, 9_000, 0));
}

#[test]
fn a_backing_that_grows_a_lot() {
    for granularity in [9, 16] {
        grows(granularity, 10, 70 * 4_096, 0);
    }
}

/// What the ancestor has past the end is hidden by zeroes that no bitmap records.
#[test]
fn a_backing_that_grows_over_a_longer_ancestor() {
    for bits in [9, 12] {
        let overlay = Spec::new(bits, 5_000 << bits).with(data([0, 4_700], 0x21));
        let backing = with_bitmaps(Spec::new(bits, (20 << bits) + 512).with(data([1, 20], 0x43)), &kinds(9));
        let ancestor = build(&Spec::new(bits, 60 << bits).with(data(0..60, 0x65)));
        let pair = Pair { resize: true, ancestor: Some(ancestor), ..Pair::new(&overlay, &backing) };
        commit_and_verify(&pair);
        if bits == 9 {
            verify_crashes(&pair);
        }
    }
}

#[test]
fn stale_bitmaps_of_a_backing_that_grows_stay() {
    let spec = Spec { autoclear: 0, ..with_bitmaps(Spec::new(9, 300 << 9), &kinds(9)) };
    let pair = Pair { resize: true, ..Pair::new(&Spec::new(9, 9_000 << 9).with(data([1, 8_000], 1)), &spec) };
    let mut io = pair.io();
    run_commit(&mut io, pair.options()).unwrap();
    let (before, after) = (&pair.backing, &io.files[&DEVICE_OUTPUT]);
    let entry = extension(before).map(|at| be64(before, at + 16) as usize).unwrap();
    assert_eq!(before[entry..entry + 512], after[entry..entry + 512]);
    assert_eq!((be64(after, 24), be64(after, 88)), (9_000 << 9, 0));
}

#[test]
fn a_bitmap_that_would_be_too_long() {
    // 512 MiB of bits for granules of 512 bytes are 2 TiB.
    let spec = with_bitmaps(Spec::new(16, 300 << 16), &[BitmapSpec::new(AUTO, 9, &[Bits::None])]);
    let pair = Pair { resize: true, ..Pair::new(&Spec::new(16, (2 << 40) + 512).with(data([1], 1)), &spec) };
    let mut io = pair.io();
    let failure = run_commit(&mut io, pair.options()).unwrap_err();
    assert_eq!(failure.error.code, ErrorCode::UnsupportedFormat);
    assert!(failure.error.text.contains("bitmap 1"), "{}", failure.error);
    assert_eq!(io.log, vec![], "something was changed");
}

#[test]
fn bits_are_durable_before_data() {
    let overlay = Spec::new(12, 64 << 12).with(data([1, 9], 0x21));
    let backing = Spec::new(12, 64 << 12).with(data([1, 9], 0x43));
    let pair = Pair::new(&overlay, &with_bitmaps(backing, &[BitmapSpec::new(AUTO, 12, &[Bits::None])]));
    let io = commit_and_verify(&pair);
    let mut files = pair.io().files;
    let mut durable = files[&DEVICE_OUTPUT].clone();
    let before = instar_qcow2_testkit::pair::views(&files).0;
    for change in &io.log {
        change.apply(&mut files);
        if *change == (Change::Flush { device: DEVICE_OUTPUT }) {
            durable.clone_from(&files[&DEVICE_OUTPUT]);
        }
        if instar_qcow2_testkit::pair::views(&files).0 != before {
            let bits = &bitmaps(&durable)[0].bits;
            assert!(bits[1] && bits[9], "data is written before its bits are durable");
            return;
        }
    }
    panic!("nothing was written");
}

#[test]
fn a_second_commit_of_the_same_ranges_changes_no_bitmap() {
    let overlay = Spec::new(12, 64 << 12).with(data([1, 9], 0x21));
    let backing = Spec::new(12, 64 << 12).with(data([1, 9], 0x43));
    let pair = Pair::new(&overlay, &with_bitmaps(backing, &[BitmapSpec::new(AUTO, 16, &[Bits::None])]));
    let io = commit_and_verify(&pair);
    let mut again = Pair { backing: io.files[&DEVICE_OUTPUT].clone(), ..pair };
    let first = bitmaps(&again.backing);
    let io = commit_and_verify(&again);
    assert_eq!(bitmaps(&io.files[&DEVICE_OUTPUT]), first);
    assert_eq!(io.files[&DEVICE_OUTPUT].len(), again.backing.len());
    // An empty overlay changes nothing at all.
    again.overlay = build(&Spec::new(12, 64 << 12));
    assert_eq!(commit_and_verify(&again).log, vec![]);
}

#[test]
fn many_scattered_clusters_in_small_memory() {
    // Each cluster has its bits in a slice of its own: more of them than are worked on at once.
    let size = 12_000u64 << 21;
    let mut overlay = Spec { table_clusters: 64, ..Spec::new(16, size) };
    overlay.clusters.extend((0..3_000).map(|i| (i * 128 + 5, State::Zero)));
    let spec = with_bitmaps(Spec { table_clusters: 64, ..Spec::new(16, size) }, &[BitmapSpec::new(AUTO, 9, &[])]);
    let pair = Pair::new(&overlay, &spec);
    // The content of such a disk is too large for the checks of other tests: bits are all there is to it.
    let mut io = pair.io();
    run_commit(&mut io, Options::default()).unwrap();
    let after = &io.files[&DEVICE_OUTPUT];
    let bits = &bitmaps(after)[0].bits;
    let expected = |bit: usize| bit % (128 << 7) / 128 == 5 && bit / (128 << 7) < 3_000;
    assert!(bits.iter().enumerate().all(|(bit, &is)| is == expected(bit)));
    assert_eq!(instar_qcow2_testkit::checker::check(after), instar_qcow2_testkit::checker::Report::default());
}

#[test]
fn without_the_autoclear_bit_bitmaps_are_stale() {
    let overlay = Spec::new(12, 64 << 12).with(data([1, 9, 12], 0x21));
    let backing = Spec::new(12, 64 << 12).with(data([1], 0x43));
    let mut spec = with_bitmaps(backing, &kinds(12));
    spec.autoclear = 0;
    let pair = Pair::new(&overlay, &spec);
    let io = commit_and_verify(&pair);
    let after = &io.files[&DEVICE_OUTPUT];
    assert_eq!(be64(after, 88), 0, "the bit was set");
    // Nothing of what the bitmaps have was written to.
    let whole = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[95] = 1;
        bitmaps(&bytes)
    };
    assert_eq!(whole(after), whole(&pair.backing));
    // Even if they make no sense.
    let mut broken = build(&spec);
    let at = extension(&broken).unwrap();
    broken[at..at + 24].fill(0xff);
    let mut io = MemoryDevices::new([(OVERLAY, build(&overlay)), (DEVICE_OUTPUT, broken)]);
    run_commit(&mut io, Options::default()).unwrap();
}

// --- refusals ---------------------------------------------------------------------------------------

const BITS: u32 = 12;

fn backing() -> Vec<u8> {
    let specs = [
        BitmapSpec::new(AUTO, 9, &[Bits::Bytes(0)]),
        BitmapSpec::new(0, 9, &[Bits::Bytes(3)]),
        BitmapSpec::new(IN_USE, 9, &[Bits::Bytes(1)]),
    ];
    build(&with_bitmaps(Spec::new(BITS, 64 << BITS).with(data([0, 1], 4)), &specs))
}

fn outcome(bytes: Vec<u8>) -> Result<(), (ErrorCode, String)> {
    let overlay = build(&Spec::new(BITS, 64 << BITS).with(data([0, 7], 1)));
    let mut io = MemoryDevices::new([(OVERLAY, overlay), (DEVICE_OUTPUT, bytes)]);
    run_commit(&mut io, Options::default()).map(|_| ()).map_err(|failure| {
        assert!(matches!(failure.step, Step::Check | Step::Plan));
        assert_eq!(io.log, vec![], "something was changed");
        (failure.error.code, failure.error.text)
    })
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn refused(change: impl Fn(&mut Vec<u8>), word: &str) {
    let mut bytes = backing();
    change(&mut bytes);
    let (code, text) = outcome(bytes).unwrap_err();
    assert_eq!(code, ErrorCode::BackingCorrupt, "{text}");
    assert!(text.contains(word), "{text:?} lacks {word:?}");
}

#[test]
fn a_damaged_extension_or_directory() {
    outcome(backing()).unwrap();
    let at = extension(&backing()).unwrap();
    let bitmap = |n: usize| bitmaps(&backing()).swap_remove(n);
    let length = be64(&backing(), at + 8);
    refused(|b| put(b, at - 4, &16u32.to_be_bytes()), "16 bytes");
    refused(|b| put(b, at, &[0; 4]), "counts 0");
    refused(|b| put(b, at, &[0, 0, 0, 4]), "for 4 bitmaps");
    refused(|b| put(b, at, &[0, 0, 0, 2]), "after its last entry");
    refused(|b| put(b, at + 4, &[1]), "reserved");
    refused(|b| put(b, at + 8, &(length - 8).to_be_bytes()), "88 bytes for 3");
    refused(|b| put(b, at + 8, &(length + 8).to_be_bytes()), "after its last entry");
    refused(|b| put(b, at + 8, &(1u64 << 25).to_be_bytes()), "past the end of the file");
    refused(|b| put(b, at + 16, &(1u64 << 40).to_be_bytes()), "past the end of the file");
    refused(|b| put(b, at + 16, &(u64::MAX << 12).to_be_bytes()), "past the end of the file");
    refused(|b| put(b, at + 16, &513u64.to_be_bytes()), "start of a cluster");
    // A second extension, after the first one.
    refused(
        |b| {
            let first = b[at - 8..at + 24].to_vec();
            put(b, at + 24, &first);
        },
        "second",
    );
    let entry = bitmap(0).at;
    refused(|b| put(b, entry, &(1u64 << 40).to_be_bytes()), "past the end of the file");
    refused(|b| put(b, entry, &[0; 8]), "start of a cluster");
    refused(|b| put(b, entry + 8, &[0xff; 4]), "entries");
    refused(|b| put(b, entry + 8, &[0; 4]), "0 entries");
    refused(|b| put(b, entry + 17, &[8]), "granularity");
    refused(|b| put(b, entry + 18, &[0, 0]), "name");
    refused(|b| put(b, entry + 18, &[3, 255]), "past the directory's end");
    refused(|b| put(b, entry + 20, &[0xff; 4]), "past the directory's end");
    refused(|b| put(b, entry + 20, &[0, 0, 0, 250]), "past the directory's end");
    // One that was not saved must be well-formed, too; but its size need not be that of the disk.
    refused(|b| put(b, bitmap(2).at, &[0x80]), "past the end of the file");
}

#[test]
fn damaged_bitmap_tables_and_clusters() {
    let bytes = backing();
    let all = bitmaps(&bytes);
    for (n, bitmap) in all.iter().enumerate() {
        let (table, cluster) = (bitmap.table as usize, bitmap.clusters[0]);
        refused(|b| put(b, table, &(cluster | 1).to_be_bytes()), "reserved");
        refused(|b| put(b, table, &(1u64 << 60).to_be_bytes()), "reserved");
        refused(|b| put(b, table, &(cluster + 512).to_be_bytes()), "start of a cluster");
        refused(|b| put(b, table, &(1u64 << 40).to_be_bytes()), "past the end of the file");
        // On the L1 table, on the table of another bitmap, on its own table, on data.
        refused(|b| put(b, table, &be64(&bytes, 40).to_be_bytes()), "overlap");
        refused(|b| put(b, table, &all[(n + 1) % 3].table.to_be_bytes()), "overlap");
        refused(|b| put(b, table, &bitmap.table.to_be_bytes()), "overlap");
        refused(|b| put(b, bitmap.at, &all[(n + 1) % 3].table.to_be_bytes()), "overlap");
        let l2 = be64(&bytes, be64(&bytes, 40) as usize) & 0xffff_ffff;
        refused(|b| put(b, table, &(be64(&bytes, l2 as usize) & 0xffff_ffff).to_be_bytes()), "metadata");
        // Refcounts of its table and its data.
        let block = be64(&bytes, be64(&bytes, 48) as usize);
        for (cluster, what) in [(bitmap.table, 0), (cluster, 0), (bitmap.table, 2), (cluster, 2)] {
            let change = |b: &mut Vec<u8>| put(b, (block + (cluster >> BITS) * 2) as usize, &[0, what]);
            if what == 0 || n == 0 {
                refused(change, &format!("refcount {what}"));
            } else {
                // A leak, in what is not written to.
                let mut bytes = backing();
                change(&mut bytes);
                outcome(bytes).unwrap();
            }
        }
    }
}

#[test]
fn tables_that_are_too_short_for_the_disk() {
    // 4097 granules of 512 bytes need two clusters of 512 bytes.
    for (flags, good) in [(AUTO, false), (0, false), (AUTO | IN_USE, true), (IN_USE, true)] {
        let spec = with_bitmaps(Spec::new(9, 4_097 << 9), &[BitmapSpec::new(flags, 9, &[Bits::None])]);
        let mut bytes = build(&spec);
        let at = bitmaps(&bytes)[0].at;
        assert_eq!(be32(&bytes, at + 8), 2);
        bytes[at + 11] = 1;
        let result = outcome(bytes);
        assert_eq!(result.is_ok(), good, "{result:?}");
        assert!(good || result.unwrap_err().1.contains("too few"));
    }
}

#[test]
fn what_the_specification_does_not_know() {
    let entry = bitmaps(&backing())[0].at;
    for (at, value, word) in [(entry + 16, 2, "type 2"), (entry + 15, 0x12, "flags")] {
        let mut bytes = backing();
        bytes[at] = value;
        let (code, text) = outcome(bytes).unwrap_err();
        assert_eq!(code, ErrorCode::UnsupportedFormat, "{text}");
        assert!(text.contains(word), "{text}");
    }
    // Extra data stands in the way only of an enabled bitmap, and not if it says so.
    for (flags, good) in [(AUTO, false), (AUTO | 4, true), (0, true), (AUTO | IN_USE, true)] {
        let mut bitmap = BitmapSpec::new(flags, 12, &[Bits::None]);
        bitmap.extra_data = vec![7; 13];
        let others = BitmapSpec::new(AUTO, 12, &[Bits::None]);
        let spec = with_bitmaps(Spec::new(BITS, 64 << BITS), &[bitmap, others]);
        let result = outcome(build(&spec));
        assert_eq!(result.is_ok(), good, "{flags}");
        assert!(good || result.unwrap_err().0 == ErrorCode::UnsupportedFormat);
        if good {
            let overlay = Spec::new(BITS, 64 << BITS).with(data([0, 7], 1));
            commit_and_verify(&Pair::new(&overlay, &spec));
        }
    }
}

#[test]
fn random_damage_is_refused_or_harmless() {
    let good = backing();
    let at = extension(&good).unwrap();
    let mut places: Vec<usize> = (at - 8..at + 24).collect();
    for bitmap in bitmaps(&good) {
        places.extend(bitmap.at..bitmap.at + bitmap.length);
        places.extend(bitmap.table as usize..bitmap.table as usize + 16);
    }
    let mut random = Random::seeded(1);
    let (mut refused, mut done) = (0, 0);
    for _ in 0..4_000 {
        let mut bytes = good.clone();
        for _ in 0..=random.below(3) {
            bytes[*random.pick(&places)] = *random.pick(&[0, 1, 0x10, 0x7f, 0x80, 0xff]);
        }
        // That nothing changes when it is refused is verified there.
        match outcome(bytes) {
            Ok(()) => done += 1,
            Err((ErrorCode::BackingCorrupt | ErrorCode::UnsupportedFormat, _)) => refused += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(refused > 1_000 && done > 500, "{refused} refused, {done} done");
}
