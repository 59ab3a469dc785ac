//! Corrupt and unsupported images: refused with the right code, and nothing is changed.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{Options, Step};
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{DriverResult, FormatDriver};
use instar_qcow2_driver::Qcow2;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::{be64, config, run_commit, OVERLAY};

const BITS: u32 = 12;
const SIZE: u64 = 1 << BITS;

fn overlay() -> Vec<u8> {
    build(&Spec::new(BITS, 64 << BITS).with([(0, State::Data(1)), (1, State::Data(2)), (9, State::Zero)]))
}

fn backing() -> Vec<u8> {
    build(&Spec::new(BITS, 64 << BITS).with([(0, State::Data(3)), (1, State::Data(4)), (9, State::Data(5))]))
}

/// Write a big-endian 64-bit field.
macro_rules! put {
    ($bytes:expr, $at:expr, $value:expr) => {{
        let (at, value): (u64, u64) = ($at, $value);
        $bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
    }};
}

fn l1(bytes: &[u8]) -> u64 {
    be64(bytes, 40)
}

fn l2(bytes: &[u8]) -> u64 {
    be64(bytes, l1(bytes) as usize) & 0x00ff_ffff_ffff_fe00
}

/// Commit the pair, expect the code, and that nothing was changed.
fn refused(overlay: Vec<u8>, backing: Vec<u8>, code: ErrorCode, word: &str) {
    let mut io = MemoryDevices::new([(OVERLAY, overlay), (DEVICE_OUTPUT, backing)]);
    let failure = run_commit(&mut io, Options::default()).unwrap_err();
    assert_eq!(failure.error.code, code, "{}", failure.error);
    assert!(failure.error.text.contains(word), "{:?} lacks {word:?}", failure.error.text);
    assert!(matches!(failure.step, Step::Check | Step::Plan));
    assert_eq!(io.log, vec![], "something was changed");
}

fn overlay_refused(change: impl Fn(&mut Vec<u8>), word: &str) {
    let mut bytes = overlay();
    change(&mut bytes);
    refused(bytes, backing(), ErrorCode::OverlayCorrupt, word);
}

fn backing_refused(change: impl Fn(&mut Vec<u8>), word: &str) {
    let mut bytes = backing();
    change(&mut bytes);
    refused(overlay(), bytes, ErrorCode::BackingCorrupt, word);
}

/// Corruptions of a mapping that are refused on either side.
fn either_refused(change: impl Fn(&mut Vec<u8>) + Copy, word: &str) {
    overlay_refused(change, word);
    backing_refused(change, word);
}

#[test]
fn the_pair_without_corruption_commits() {
    let mut io = MemoryDevices::new([(OVERLAY, overlay()), (DEVICE_OUTPUT, backing())]);
    assert_eq!(run_commit(&mut io, Options::default()).unwrap().clusters_committed, 3);
}

#[test]
fn entries_past_the_end_of_the_file() {
    either_refused(|b| put!(b, l2(b), 1 << 40 | 1 << 63), "past the end");
    either_refused(|b| put!(b, l1(b), 1 << 40 | 1 << 63), "past the end");
    either_refused(|b| put!(b, be64(b, 48) + 8, 1 << 40), "past the end");
    either_refused(|b| put!(b, 48, 1 << 40), "past the end");
    either_refused(|b| put!(b, 40, 1 << 40), "past the end");
    let end = 0x00ff_ffff_ffff_f000;
    either_refused(|b| put!(b, l2(b), end | 1 << 63), "past the end");
    either_refused(|b| put!(b, l1(b), end | 1 << 63), "past the end");
}

#[test]
fn unaligned_entries() {
    either_refused(|b| put!(b, l2(b), (8 * SIZE + 512) | 1 << 63), "not the start of a cluster");
    either_refused(|b| put!(b, l1(b), (3 * SIZE + 512) | 1 << 63), "not the start of a cluster");
    either_refused(|b| put!(b, be64(b, 48), 512), "not the start of a cluster");
    either_refused(|b| put!(b, 40, 3 * SIZE + 512), "not the start of a cluster");
}

#[test]
fn reserved_bits() {
    either_refused(|b| put!(b, l2(b), be64(b, l2(b) as usize) | 1 << 57), "reserved");
    either_refused(|b| put!(b, l1(b), be64(b, l1(b) as usize) | 1), "reserved");
    either_refused(|b| put!(b, be64(b, 48), be64(b, be64(b, 48) as usize) | 2), "reserved");
}

#[test]
fn data_on_metadata() {
    // Refcount table, L1 table, L2 table.
    for target in [1, 2, 3] {
        overlay_refused(|b| put!(b, l2(b), (target * SIZE) | (1 << 63)), "overlaps");
        backing_refused(|b| put!(b, l2(b), (target * SIZE) | (1 << 63)), "metadata");
    }
    either_refused(|b| put!(b, be64(b, 48) + 8, 3 * SIZE), "overlap");
    either_refused(|b| put!(b, l1(b), be64(b, 48) | 1 << 63), "overlap");
}

#[test]
fn two_entries_with_one_cluster() {
    overlay_refused(|b| put!(b, l2(b) + 8, be64(b, l2(b) as usize)), "overlaps");
    backing_refused(|b| put!(b, l2(b) + 8, be64(b, l2(b) as usize)), "two L2 entries");
}

#[test]
fn refcounts_below_the_references() {
    let zero_refcounts = |b: &mut Vec<u8>| {
        let block = be64(b, be64(b, 48) as usize) as usize;
        b[block..block + SIZE as usize].fill(0);
    };
    overlay_refused(zero_refcounts, "refcount 0");
    backing_refused(zero_refcounts, "refcount 0");
    overlay_refused(|b| put!(b, be64(b, 48), 0), "refcount 0");
    // A backing cluster that something else owns, too.
    backing_refused(
        |b| {
            let cluster = (be64(b, l2(b) as usize) & 0xffff_ffff) >> BITS;
            let block = be64(b, be64(b, 48) as usize);
            let at = (block + cluster * 2) as usize;
            b[at..at + 2].copy_from_slice(&2u16.to_be_bytes());
        },
        "refcount 2",
    );
    backing_refused(|b| put!(b, l2(b), be64(b, l2(b) as usize) & !(1 << 63)), "COPIED flag is clear");
}

#[test]
fn truncated_files() {
    let whole = overlay().len();
    for length in [0, 3, 71, 103, 512, SIZE as usize, 2 * SIZE as usize, whole - SIZE as usize] {
        let mut bytes = overlay();
        bytes.truncate(length);
        if length < 104 {
            // The host would not get so far: open it with the facts that it had before.
            let facts = config(&MemoryDevices::new([(OVERLAY, overlay())]), OVERLAY);
            let mut io = MemoryDevices::new([(OVERLAY, bytes)]);
            let facts = instar_guest_sdk::abi::DeviceConfig { file_length: length as u64, ..facts };
            assert!(Qcow2::open_source(&mut io, &facts).is_err());
            continue;
        }
        let mut io = MemoryDevices::new([(OVERLAY, bytes), (DEVICE_OUTPUT, backing())]);
        let failure = run_commit(&mut io, Options::default()).unwrap_err();
        assert_eq!(failure.error.code, ErrorCode::OverlayCorrupt, "{length}: {}", failure.error);
        assert_eq!(io.log, vec![]);
    }
}

#[test]
fn features_that_are_not_supported_yet() {
    type Edit = fn(&mut Vec<u8>);
    let cases: [(Edit, ErrorCode, &str); 4] = [
        // The host saw no other file.
        (|b| put!(b, 72, 4), ErrorCode::HeaderMismatch, "another data file"),
        (|b| put!(b, 72, 1 << 50), ErrorCode::UnsupportedFormat, "unknown incompatible"),
        (|b| b[35] = 2, ErrorCode::LuksUnsupported, "encryption (luks)"),
        (|b| b[35] = 1, ErrorCode::LuksUnsupported, "encryption (aes)"),
    ];
    for (edit, code, word) in cases {
        let mut bytes = overlay();
        edit(&mut bytes);
        refused(bytes, backing(), code, word);
        let mut bytes = backing();
        edit(&mut bytes);
        refused(overlay(), bytes, code, word);
    }
    either_refused(|b| put!(b, 72, 2), "marked corrupt");
}

#[test]
fn garbage_in_a_compressed_cluster() {
    let compressed =
        Spec::new(BITS, 64 << BITS).with([(0, State::Compressed), (1, State::Data(1)), (9, State::Data(2))]);
    refused(build(&compressed), backing(), ErrorCode::ParseFailed, "does not decode");
    // In the backing it matters only if a part of it is needed.
    let part = build(&Spec::new(9, 64 << BITS).with([(0, State::Data(1))]));
    refused(part, build(&compressed), ErrorCode::ParseFailed, "does not decode");
}

#[test]
fn an_overlay_that_holds_data_past_the_end_of_the_backing() {
    let small = build(&Spec::new(BITS, 9 << BITS));
    refused(overlay(), small, ErrorCode::BackingTooSmall, "past the end of the backing");
    // Without data there it fits.
    let small = build(&Spec::new(BITS, 10 << BITS));
    let mut io = MemoryDevices::new([(OVERLAY, overlay()), (DEVICE_OUTPUT, small)]);
    run_commit(&mut io, Options::default()).unwrap();
}

#[test]
fn a_header_that_changed_since_the_host_looked() {
    fn opens(bytes: Vec<u8>, change: fn(&mut instar_guest_sdk::abi::DeviceConfig)) -> DriverResult<()> {
        let mut io = MemoryDevices::new([(OVERLAY, bytes)]);
        let mut facts = config(&io, OVERLAY);
        change(&mut facts);
        Qcow2::open_source(&mut io, &facts).map(|_| ())
    }
    opens(overlay(), |_| ()).unwrap();
    let cases: [fn(&mut instar_guest_sdk::abi::DeviceConfig); 2] = [|f| f.virtual_size += 512, |f| f.cluster_size *= 2];
    for change in cases {
        assert_eq!(opens(overlay(), change).unwrap_err().code, ErrorCode::HeaderMismatch);
    }
    let mut io = MemoryDevices::new([(OVERLAY, vec![0; 8192])]);
    let facts = config(&MemoryDevices::new([(OVERLAY, overlay())]), OVERLAY);
    assert_eq!(Qcow2::open_source(&mut io, &facts).err().unwrap().code, ErrorCode::HeaderMismatch);
}

#[test]
fn a_backing_that_is_cut_off_may_not_grow_over_what_it_lost() {
    // The overlay needs a new cluster; the last cluster of the backing, which it does not touch, is cut.
    let spec = Spec::new(BITS, 64 << BITS).with([(0, State::Data(3)), (63, State::Data(4))]);
    let overlay = build(&Spec::new(BITS, 64 << BITS).with([(5, State::Data(1))]));
    let whole = build(&spec).len() as u64;
    for cut in [1, 512, SIZE] {
        // With the refcount blocks in front, data is last in the file.
        let mut bytes = build(&Spec { blocks_first: true, ..spec.clone() });
        let length = bytes.len() as u64 - cut;
        bytes.truncate(length as usize);
        refused(overlay.clone(), bytes, ErrorCode::BackingCorrupt, "cut off");
    }
    // Clusters past the end that nothing refers to are leaks.
    let mut leaky = build(&spec);
    let block = be64(&leaky, be64(&leaky, 48) as usize);
    let at = (block + (whole >> BITS) * 2) as usize;
    leaky[at + 1] = 1;
    let mut io = MemoryDevices::new([(OVERLAY, overlay), (DEVICE_OUTPUT, leaky)]);
    run_commit(&mut io, Options::default()).unwrap();
}

#[test]
fn bitmaps_of_subclusters_that_contradict_themselves() {
    let top = build(&Spec::new(14, 64 << 14).with([(5, State::Data(1))]));
    for (bitmap, entry) in [(1 << 32 | 1, None), (1, Some(0u64)), (1, Some(1 << 62 | 0x4000))] {
        let mut backing = build(&Spec { extended: true, ..Spec::new(14, 64 << 14) }.with([(5, State::Data(2))]));
        let table = be64(&backing, be64(&backing, 40) as usize) & 0x00ff_ffff_ffff_fe00;
        let at = table as usize + 5 * 16;
        backing[at + 8..at + 16].copy_from_slice(&u64::to_be_bytes(bitmap));
        if let Some(entry) = entry {
            backing[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        }
        refused(top.clone(), backing, ErrorCode::BackingCorrupt, "subcluster");
    }
}
