//! Repairs on request: `instar check -r`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{device_flags, Repair, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::random::Random;
use instar_qcow2_testkit::bitmaps::{BitmapSpec, Bits, AUTO};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::checker::{check, Report, View};
use instar_qcow2_testkit::damage::{drop_blocks, put64, set_refcount, spoil, OFFSET};
use instar_qcow2_testkit::pair::{data, is_dirty};
use instar_qcow2_testkit::{be32, be64, Kit};
use instar_testkit::crashes;
use instar_testkit::mended::{keeps_content, mend, repair_on, verify_crashes, verify_failing_requests, verify_mended};

/// Some of everything.
fn spec(bits: u32, order: u32, snapshots: usize) -> Spec {
    let size = 300u64 << bits;
    let spec = Spec { refcount_order: order, table_clusters: 2, snapshots, ..Spec::new(bits, size) };
    let mut spec = spec.with(data([0, 1, 2, 150, 298, 299], 0x40)).with([
        (3, State::Zero),
        (4, State::ZeroAllocated(5)),
        (6, State::Zero),
    ]);
    // Several compressed clusters share a host cluster.
    if order > 3 {
        spec.clusters.extend((100..106).map(|c| (c, State::Deflated(0x55))));
    }
    spec
}

/// Corruptions of an image: refcounts that are too low, and whatever else the checker calls an error but COPIED flags, which
/// follow the refcounts.
fn errors(bytes: &[u8]) -> Vec<String> {
    check(bytes).errors.into_iter().filter(|error| !error.contains("COPIED")).collect()
}

/// Anything is wrong now that was not before. Of a refcount that is too low, the number may be another one.
fn is_worse(was: &[u8], is: &[u8]) -> bool {
    let words = |error: &String| error.split(':').next().map(str::to_owned);
    let before: Vec<_> = errors(was).iter().map(words).collect();
    errors(is).iter().any(|error| !before.contains(&words(error)))
}

fn sound(bytes: &[u8]) {
    assert_eq!(check(bytes), Report::default());
    assert!(!is_dirty(bytes));
}

/// As many wrong refcounts and flags as [`spoil`] makes; without the dirty bit, if no snapshots explain refcounts over 1.
fn spoiled(spec: &Spec, seed: u64) -> Vec<u8> {
    let mut bytes = build(spec);
    spoil(&mut bytes, seed);
    if spec.snapshots > 0 {
        return bytes;
    }
    let features = be64(&bytes, 72) & !1;
    put64(&mut bytes, 72, features);
    bytes
}

#[test]
fn any_refcounts_and_flags() {
    for bits in [9, 12, 16] {
        for order in 0..=6 {
            for snapshots in [0, 2] {
                if order < 2 && snapshots > 0 {
                    continue;
                }
                for seed in 0..3 {
                    let bytes = spoiled(&spec(bits, order, snapshots), seed + u64::from(bits + order));
                    let mended = verify_mended(&Kit, &bytes, Repair::All);
                    sound(mended.bytes());
                    assert!(mended.told.is_empty(), "{:?}", mended.told);
                    let marks = u64::from(is_dirty(&bytes));
                    assert_eq!(mended.planned.corruptions, mended.before.corruptions + marks);
                    let leaks = verify_mended(&Kit, &bytes, Repair::Leaks);
                    assert_eq!(check(leaks.bytes()).leaks, 0);
                    assert!(!is_worse(&bytes, leaks.bytes()));
                }
            }
        }
    }
}

#[test]
fn every_crash_is_finished_by_another_repair() {
    let mut states = 0;
    for snapshots in [0, 2] {
        for what in [Repair::All, Repair::Leaks] {
            let mut bytes = spoiled(&spec(9, 4, snapshots), 7);
            states += verify_crashes(&Kit, &bytes, (what, crashes()), &is_worse);
            put64(&mut bytes, 72, 3);
            states += verify_crashes(&Kit, &bytes, (what, crashes()), &is_worse);
            drop_blocks(&mut bytes, &[1]);
            states += verify_crashes(&Kit, &bytes, (what, crashes()), &is_worse);
        }
    }
    assert!(states > 60, "{states}");
}

#[test]
fn a_request_that_fails_loses_nothing() {
    let mut bytes = spoiled(&spec(9, 4, 1), 7);
    put64(&mut bytes, 72, 1);
    drop_blocks(&mut bytes, &[1]);
    verify_failing_requests(&Kit, &bytes, Repair::All);
    verify_failing_requests(&Kit, &bytes, Repair::Leaks);
}

#[test]
fn what_is_consistent_is_not_touched() {
    for (bits, order) in [(9, 4), (12, 6), (16, 1)] {
        for what in [Repair::All, Repair::Leaks] {
            let mended = verify_mended(&Kit, &build(&spec(bits, order, 0)), what);
            assert!(mended.io.log.is_empty() && mended.told.is_empty());
        }
    }
}

#[test]
fn refcount_blocks_are_missing() {
    let spec = Spec { snapshots: 1, ..Spec::new(9, 1_200 << 9) }.with(data(0..700, 0x12));
    for dropped in [&[0][..], &[1], &[0, 1, 2], &[2], &[0, 1, 2, 3]] {
        let mut bytes = build(&spec);
        drop_blocks(&mut bytes, dropped);
        put64(&mut bytes, 72, 0);
        let mended = verify_mended(&Kit, &bytes, Repair::All);
        sound(mended.bytes());
        assert!(mended.planned.final_length >= bytes.len() as u64, "{:?}", mended.planned);
        verify_crashes(&Kit, &bytes, (Repair::All, crashes()), &is_worse);
        // On a device there is no end to put them at.
        let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.clone())]);
        let (planned, told) = repair_on(&Kit, &mut io, Repair::All, device_flags::FIXED_LENGTH).unwrap();
        assert_eq!((planned.corruptions, planned.leaks), (0, 0));
        assert!(told.iter().any(|text| text.contains("a block device has no end")), "{told:?}");
        assert!(io.log.is_empty());
    }
}

#[test]
fn the_refcount_table_is_too_short() {
    // One cluster of table describes 64 blocks of 256 clusters.
    let mut bytes = build(&Spec { table_clusters: 2, ..Spec::new(9, 17_000 << 9) }.with(data(0..16_500, 0x12)));
    bytes[59] = 1;
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    sound(mended.bytes());
    assert!(be32(mended.bytes(), 56) > 1);
}

#[test]
fn marks_go_when_nothing_is_left() {
    let mut bytes = build(&spec(12, 4, 1));
    for (marks, left) in [(1, 0), (2, 0), (3, 0)] {
        put64(&mut bytes, 72, marks);
        for what in [Repair::All, Repair::Leaks] {
            let mended = verify_mended(&Kit, &bytes, what);
            assert_eq!((mended.planned.corruptions, be64(mended.bytes(), 72)), (1, left));
        }
    }
    // A refcount that is too low is not what leaks are.
    let low = bytes.len() as u64 / 4096 - 2;
    set_refcount(&mut bytes, low, 0);
    assert_eq!(be64(verify_mended(&Kit, &bytes, Repair::Leaks).bytes(), 72), 3);
    assert_eq!(be64(verify_mended(&Kit, &bytes, Repair::All).bytes(), 72), 0);
}

#[test]
fn bitmaps_and_snapshots_are_kept() {
    let bitmaps = vec![BitmapSpec::new(AUTO, 9, &[Bits::Bytes(0x81), Bits::None]), BitmapSpec::new(1, 9, &[Bits::All])];
    let spec = Spec { bitmaps, autoclear: 1, leaks: 3, ..spec(9, 4, 2) };
    let bytes = spoiled(&spec, 5);
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    sound(mended.bytes());
    assert_eq!(be64(mended.bytes(), 88), 1);
    verify_crashes(&Kit, &bytes, (Repair::All, crashes()), &is_worse);
    // Stale ones belong to nothing, and stay nevertheless.
    let mut stale = build(&spec);
    put64(&mut stale, 88, 0);
    let mended = verify_mended(&Kit, &stale, Repair::All);
    assert!(mended.io.log.is_empty() && mended.told[0].contains("stale"), "{:?}", mended.told);
}

#[test]
fn a_device_keeps_its_length() {
    for (bits, seed) in [(9, 1), (12, 2), (16, 3)] {
        let mut bytes = spoiled(&spec(bits, 4, 1), seed);
        // Stale bytes behind the image.
        bytes.resize(bytes.len() + (20 << bits), 0x99);
        let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.clone())]);
        let (planned, told) = repair_on(&Kit, &mut io, Repair::All, device_flags::FIXED_LENGTH).unwrap();
        assert!(planned.corruptions > 0 && planned.final_length == 0 && told.is_empty(), "{planned:?} {told:?}");
        let after = &io.files[&DEVICE_OUTPUT];
        assert!(after.len() == bytes.len() && keeps_content(&Kit, &bytes, after));
        sound(after);
    }
}

#[test]
fn what_an_unknown_header_extension_may_own_is_kept() {
    let mut bytes = build(&Spec { leaks: 3, ..spec(12, 4, 0) });
    bytes[104..112].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0]);
    let low = bytes.len() as u64 / 4096 - 2;
    set_refcount(&mut bytes, low, 0);
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert_eq!((mended.planned.corruptions, mended.planned.leaks), (mended.before.corruptions, 0));
    assert!(mended.told[0].starts_with("3 clusters"), "{:?}", mended.told);
    assert_eq!(check(mended.bytes()), Report { errors: Vec::new(), leaks: 3 });
}

#[test]
fn unknown_autoclear_bits_go_first() {
    let mut bytes = spoiled(&spec(9, 4, 0), 3);
    put64(&mut bytes, 88, 1 << 40 | 1);
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert_eq!(be64(mended.bytes(), 88), 1);
    sound(mended.bytes());
}

#[test]
fn version_2_and_extended_entries() {
    let old = Spec { snapshots: 1, ..Spec::new(12, 300 << 12) }.with(data([0, 1, 2, 150, 299], 0x40)).version(2);
    let mut bytes = build(&old);
    for cluster in 0..9 {
        set_refcount(&mut bytes, cluster, cluster % 3);
    }
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert_eq!(check(mended.bytes()), Report::default(), "{:?}", mended.told);
    let extended = Spec { extended: true, ..Spec::new(14, 40 << 14) }.with([
        (0, State::Mixed(7, 0xff, 0xff00)),
        (5, State::MixedZero(1)),
        (9, State::Data(3)),
    ]);
    let mut bytes = spoiled(&extended, 4);
    put64(&mut bytes, 72, 16);
    sound(verify_mended(&Kit, &bytes, Repair::All).bytes());
}

#[test]
fn data_that_two_entries_name_is_shared_from_then_on() {
    let mut bytes = build(&Spec::new(12, 64 << 12).with(data([1, 2, 3], 9)));
    let l2 = be64(&bytes, be64(&bytes, 40) as usize) & OFFSET;
    let entry = be64(&bytes, l2 as usize + 8);
    let (cluster, lost) = ((entry & OFFSET) >> 12, (be64(&bytes, l2 as usize + 24) & OFFSET) >> 12);
    put64(&mut bytes, l2 + 24, entry);
    // What the damaged entry named is the only copy, also for a user who repairs twice.
    for what in [Repair::Leaks, Repair::All, Repair::Leaks] {
        let mended = verify_mended(&Kit, &bytes, what);
        assert!(mended.told[0].contains("name a cluster that another one names"), "{:?}", mended.told);
        assert_eq!(View::new(mended.bytes()).refcount(lost), 1);
        assert!(mended.after.corruptions >= 1 && mended.after.leaks == 1, "{:?}", mended.after);
        bytes = mended.bytes().to_vec();
    }
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert!(mended.io.log.is_empty());
    assert_eq!(View::new(mended.bytes()).refcount(cluster), 2);
    assert_eq!(be64(mended.bytes(), l2 as usize + 24) >> 63, 0);
    verify_crashes(&Kit, &bytes, (Repair::All, crashes()), &is_worse);
    // With a refcount of one bit there is no way.
    let mut bytes = build(&Spec { refcount_order: 0, ..Spec::new(12, 64 << 12) }.with(data([1, 2], 9)));
    let l2 = be64(&bytes, be64(&bytes, 40) as usize) & OFFSET;
    let entry = be64(&bytes, l2 as usize + 8);
    put64(&mut bytes, l2 + 24, entry);
    put64(&mut bytes, 72, 2);
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert!(mended.io.log.is_empty() && mended.told[0].contains("too many"), "{:?}", mended.told);
}

#[test]
fn what_cannot_be_mended_without_loss_is_told_and_every_byte_stays() {
    let l2 = |bytes: &[u8]| be64(bytes, be64(bytes, 40) as usize) & OFFSET;
    // Where the number goes, and the number.
    type Edit = fn(&[u8], u64) -> (u64, u64);
    let disk = "the cluster of the disk at guest offset 286720";
    let edits: [(Edit, &str, &str); 6] = [
        (|_, l2| (l2 + 70 * 8, 1 << 40), "past the end", disk),
        (|_, l2| (l2 + 70 * 8, l2), "is metadata", disk),
        (|_, l2| (l2 + 70 * 8, 5 << 13 | 1 << 57), "reserved", disk),
        (|b, _| (be64(b, 48) + 8, 512), "not the start of a cluster", "no cluster of the disk"),
        (|b, l2| (be64(b, 40), l2 | 1 << 40), "past the end", "300 clusters of the disk, the first at guest offset 0"),
        (|b, l2| (be64(b, 48) + 8, l2), "overlap", "no cluster of the disk"),
    ];
    for (edit, word, lost) in edits {
        let mut bytes = spoiled(&spec(12, 4, 1), 3);
        let (at, value) = edit(&bytes, l2(&bytes));
        put64(&mut bytes, at, value);
        for what in [Repair::All, Repair::Leaks] {
            let mended = mend(&Kit, &bytes, what).unwrap();
            assert!(mended.io.log.is_empty() && mended.bytes() == bytes, "{word}");
            let told = mended.told.first().unwrap_or_else(|| unreachable!("{word}"));
            assert!(told.contains(word) && told.contains("losing") && told.contains(lost), "{told}");
        }
    }
    // Entries behind the end of the disk are no part of it.
    let mut bytes = spoiled(&spec(12, 4, 1), 3);
    let end = be64(&bytes, 24) >> 12;
    let at = l2(&bytes) + end * 8;
    assert!(end < 512);
    put64(&mut bytes, at, 1 << 40);
    let told = mend(&Kit, &bytes, Repair::All).unwrap().told;
    assert!(told[0].contains("past the end") && told[0].contains("no cluster of the disk"), "{told:?}");
    // An extended entry has two halves.
    let extended = Spec { extended: true, ..Spec::new(14, 40 << 14) }.with([(5, State::Mixed(7, 0xff, 0xff00))]);
    for (half, value) in [(0, 1 << 40), (8, 1 << 32 | 1)] {
        let mut bytes = build(&extended);
        let at = l2(&bytes) + 5 * 16 + half;
        put64(&mut bytes, at, value);
        let told = mend(&Kit, &bytes, Repair::All).unwrap().told;
        assert!(told[0].contains("the cluster of the disk at guest offset 81920"), "{told:?}");
    }
}

#[test]
fn little_memory_takes_many_passes() {
    let spec = Spec { table_clusters: 2, snapshots: 1, ..Spec::new(9, 17_000 << 9) }
        .with((0..16_000).filter(|c| c % 7 != 0).map(|c| (c, State::Data(c as u8))));
    let mut bytes = spoiled(&spec, 12);
    drop_blocks(&mut bytes, &[7, 30]);
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.clone())]);
    io.heap = Some(60 << 10);
    repair_on(&Kit, &mut io, Repair::All, 0).unwrap();
    sound(&io.files[&DEVICE_OUTPUT]);
    assert!(keeps_content(&Kit, &bytes, &io.files[&DEVICE_OUTPUT]));
}

#[test]
fn whatever_the_metadata_says_what_was_readable_stays() {
    let mut random = Random::seeded(77);
    let bitmaps = vec![BitmapSpec::new(AUTO, 9, &[Bits::Bytes(0x81), Bits::None])];
    let whole = build(&Spec { bitmaps, autoclear: 1, leaks: 3, ..spec(9, 4, 1) });
    let (mut done, mut refused, mut left) = (0, 0, 0);
    for number in 0..10_000 {
        let mut bytes = whole.clone();
        if number % 2 == 0 {
            spoil(&mut bytes, number);
        }
        for _ in 0..=random.below(2) {
            // Any 8 bytes of header, tables, or the rest.
            let end = [140, 14 << 9, bytes.len() as u64 - 8][random.below(3) as usize];
            let at = random.below(end / 4) * 4;
            let was = be64(&bytes, at as usize);
            let value = [was ^ 1 << random.below(64), random.below(200) << 9, u64::MAX, 0][random.below(4) as usize];
            put64(&mut bytes, at, value);
        }
        if &bytes[..4] != b"QFI\xfb" || be32(&bytes, 20) > 21 {
            continue;
        }
        match mend(&Kit, &bytes, Repair::All) {
            Ok(mended) => {
                instar_testkit::mended::verify(&Kit, &bytes, Repair::All, &mended);
                done += usize::from(!mended.io.log.is_empty());
                left += usize::from(mended.after.corruptions != 0);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(done > 3000 && refused > 300 && left > 300, "{done} {refused} {left}");
}
