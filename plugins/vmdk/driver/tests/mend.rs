//! Repairs on request: `instar check -r`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::Repair;
use instar_guest_sdk::random::Random;
use instar_testkit::crashes;
use instar_testkit::mended::{check, verify_crashes, verify_damaged, verify_failing_requests, verify_mended};
use instar_testkit::ImageKit;
use instar_vmdk_testkit::{build, le32, le64, put32, Kit, Spec, State, View, GRAIN};

const SIZE: usize = 1500 * GRAIN;

fn spec() -> Spec {
    let data = [0, 1, 3, 511, 512, 700, 1024, 1499].map(|grain| (grain, State::Data(7)));
    Spec::new(SIZE, 1, 2).with(data).with([(5, State::Zero)])
}

/// Where the entry of a grain is, in the copy of this number.
fn entry(bytes: &[u8], copy: usize, grain: usize) -> usize {
    let directory = le64(bytes, [56, 48][copy]) as usize * 512;
    le32(bytes, directory + grain / 512 * 4) * 512 + grain % 512 * 4
}

fn is_worse(was: &[u8], is: &[u8]) -> bool {
    check(&Kit, is).unwrap().corruptions > check(&Kit, was).unwrap().corruptions
}

type Damage = fn(&mut Vec<u8>);

/// What is done to an image, and how many corruptions and leaks of that are mended.
const DAMAGES: [(Damage, u64, u64); 7] = [
    // A crash between the two writes: the first copy counts.
    (|bytes| put_entry(bytes, 1, 3, 0), 0, 1),
    (
        |bytes| {
            let behind = bytes.len() / 512;
            bytes.resize(bytes.len() + GRAIN, 0x33);
            put_entry(bytes, 1, 5, behind);
            assert_eq!(le32(bytes, entry(bytes, 0, 5)), 1);
        },
        0,
        1,
    ),
    // The second copy is damaged.
    (|bytes| put_entry(bytes, 1, 700, 1 << 30), 0, 1),
    // The first copy is damaged, and the second one is not.
    (|bytes| put_entry(bytes, 0, 3, 1 << 30), 1, 0),
    (
        |bytes| {
            for grain in 512..1024 {
                put_entry(bytes, 0, grain, 0x7fff_0000 + grain);
            }
        },
        // Not all of them are there in the second copy.
        0,
        0,
    ),
    (|bytes| bytes[72] = 1, 1, 0),
    (
        |bytes| {
            bytes[72] = 1;
            put_entry(bytes, 0, 0, 0xffff_ffff);
            put_entry(bytes, 1, 1, 0xffff_ffff);
            put_entry(bytes, 1, 1024, 0);
        },
        2,
        1,
    ),
];

fn put_entry(bytes: &mut [u8], copy: usize, grain: usize, value: usize) {
    let at = entry(bytes, copy, grain);
    put32(bytes, at, value);
}

#[test]
fn what_one_copy_says_is_written_into_the_other() {
    for (damage, corruptions, leaks) in DAMAGES {
        let mut bytes = build(&spec());
        let want = bytes.clone();
        damage(&mut bytes);
        let want = [&want, bytes.get(want.len()..).unwrap_or_default()].concat();
        let mended = verify_mended(&Kit, &bytes, Repair::All);
        assert_eq!((mended.planned.corruptions, mended.planned.leaks), (corruptions, leaks), "{:?}", mended.told);
        assert_ne!((mended.before.corruptions, mended.before.leaks), (0, 0));
        if (corruptions, leaks) != (0, 0) {
            assert!(
                mended.told.is_empty() && mended.after.corruptions == 0 && mended.bytes() == want,
                "{:?}",
                mended.told
            );
        }
        verify_crashes(&Kit, &bytes, (Repair::All, crashes()), &is_worse);
        verify_failing_requests(&Kit, &bytes, Repair::All);
        // What a crash leaves goes with the leaks, and what is damaged stays.
        let mended = verify_mended(&Kit, &bytes, Repair::Leaks);
        assert_eq!((mended.planned.corruptions, mended.planned.leaks), (0, leaks));
        assert_eq!((mended.after.corruptions, mended.after.leaks), (mended.before.corruptions, 0));
        verify_crashes(&Kit, &bytes, (Repair::Leaks, crashes()), &is_worse);
    }
}

#[test]
fn what_has_no_right_answer_is_told_and_stays() {
    let mut bytes = build(&spec());
    let other = le32(&bytes, entry(&bytes, 0, 512));
    // Both can be right: the second copy names the places of other grains.
    put_entry(&mut bytes, 1, 1, other);
    put_entry(&mut bytes, 1, 3, other);
    bytes[72] = 1;
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert!(mended.io.log.is_empty(), "{:?}", mended.planned);
    assert!(mended.told[0].contains("grain table 0") && mended.told[0].contains("2 grains"), "{:?}", mended.told);
    assert!(mended.told[1].contains("stays marked"), "{:?}", mended.told);
    // Another table is mended nevertheless.
    put_entry(&mut bytes, 1, 700, 0);
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert_eq!((mended.planned.corruptions, mended.planned.leaks, mended.after.corruptions), (0, 1, 2));

    // Where a grain is lost, nothing is written.
    let mut bytes = build(&spec());
    for copy in 0..2 {
        put_entry(&mut bytes, copy, 3, 1 << 30);
    }
    put_entry(&mut bytes, 1, 700, 0);
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert!(mended.io.log.is_empty() && mended.told[0].contains("past the end of the file"), "{:?}", mended.told);
    // Nor where both copies together put two grains into one place.
    let mut bytes = build(&spec());
    put_entry(&mut bytes, 0, 3, 1 << 30);
    put_entry(&mut bytes, 1, 3, other);
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert!(mended.io.log.is_empty() && mended.told[0].contains("overlaps"), "{:?}", mended.told);
    // Nor where a first copy was overwritten with zeroes: the second one is all that is left of it.
    let mut bytes = build(&spec());
    (0..512).for_each(|grain| put_entry(&mut bytes, 0, grain, 0));
    for repair in [Repair::Leaks, Repair::All] {
        let mended = verify_mended(&Kit, &bytes, repair);
        assert!(mended.io.log.is_empty() && mended.before.corruptions == 1, "{:?}", mended.told);
    }
}

#[test]
fn a_check_goes_on_behind_what_it_finds() {
    let mut bytes = build(&spec());
    for grain in [0, 512, 1024] {
        put_entry(&mut bytes, 0, grain, 1 << 30);
    }
    bytes[72] = 1;
    // Three grains, three tables that differ, and the mark.
    assert_eq!(check(&Kit, &bytes).unwrap().corruptions, 7);
    let directory = le64(&bytes, 56) as usize * 512;
    put32(&mut bytes, directory + 4, 1 << 30);
    assert_eq!(check(&Kit, &bytes).unwrap().corruptions, 6);
}

#[test]
fn what_is_whole_is_not_touched() {
    let specs = [
        spec(),
        Spec { redundant: false, ..spec() },
        Spec { lazy_tables: true, ..spec() },
        Spec { zeroed: false, ..Spec::new(SIZE, 1, 2) },
    ];
    for spec in specs {
        let mended = verify_mended(&Kit, &build(&spec), Repair::All);
        assert!(mended.io.log.is_empty() && mended.told.is_empty() && mended.before.corruptions == 0);
    }
}

#[test]
fn whatever_is_damaged_what_was_readable_stays() {
    let mut random = Random::seeded(5);
    let images =
        [build(&spec()), build(&Spec { redundant: false, ..spec() }), build(&Spec { lazy_tables: true, ..spec() })];
    let damaged = std::iter::repeat_with(|| {
        let mut bytes = random.pick(&images).clone();
        for _ in 0..1 + random.below(3) {
            let copy = usize::from(random.coin() && le32(&bytes, 8) & 2 != 0);
            let grain = random.below(1500) as usize;
            let at = entry(&bytes, copy, grain);
            if at >= 512 && at + 4 <= bytes.len() {
                let value = *random.pick(&[0, 1, 1 << 30, le32(&bytes, at) + 2, bytes.len() / 512, 40]);
                put32(&mut bytes, at, value);
            }
            if random.below(3) == 0 {
                bytes[72] = 1;
            }
        }
        bytes
    });
    let (changed, left) = verify_damaged(&Kit, damaged.take(400));
    assert!(changed > 40 && left > 40, "{changed} {left}");
    let whole = build(&spec());
    assert!(Kit.is_sound(&whole) && View::new(&whole).entries[0] == View::new(&whole).entries[1]);
}
