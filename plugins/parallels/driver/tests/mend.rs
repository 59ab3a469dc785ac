//! Repairs on request: `instar check -r`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::Repair;
use instar_guest_sdk::random::Random;
use instar_parallels_testkit::{build, le32, put32, Kit, Spec, CLUSTER, OPEN};
use instar_testkit::mended::{mend, verify_crashes, verify_damaged, verify_failing_requests, verify_mended};
use instar_testkit::{crashes, ImageKit};

/// Where the header has `in_use` and `ext_off`.
const IN_USE: usize = 44;
const EXT_OFF: usize = 56;

fn open() -> Vec<u8> {
    let mut bytes = build(&Spec::new(50 * CLUSTER).with([(0, 1), (1, 2), (7, 3)]));
    put32(&mut bytes, IN_USE, OPEN);
    bytes
}

#[test]
fn an_image_that_was_not_closed_is_closed() {
    let bytes = open();
    let mended = verify_mended(&Kit, &bytes, Repair::All);
    assert_eq!((mended.planned.corruptions, mended.after.corruptions), (1, 0));
    assert_ne!(le32(mended.bytes(), IN_USE), OPEN);
    verify_crashes(&Kit, &bytes, (Repair::All, crashes()), &|was, is| Kit.is_sound(was) && !Kit.is_sound(is));
    verify_failing_requests(&Kit, &bytes, Repair::All);
    assert!(mend(&Kit, &bytes, Repair::Leaks).unwrap().io.log.is_empty());
}

#[test]
fn an_image_in_which_something_is_wrong_stays_open() {
    type Edit = fn(&mut Vec<u8>);
    let edits: [(Edit, &str); 3] = [
        (|bytes| put32(bytes, 64 + 80, 1001), "past the end"),
        (|bytes| bytes.copy_within(68..72, 144), "the same place"),
        (|bytes| put32(bytes, EXT_OFF, 4), "where no cluster lies"),
    ];
    for (edit, words) in edits {
        let mut bytes = open();
        edit(&mut bytes);
        let mended = verify_mended(&Kit, &bytes, Repair::All);
        assert!(mended.io.log.is_empty() && mended.told[0].contains(words), "{:?}", mended.told);
    }
}

#[test]
fn whatever_is_damaged_what_was_readable_stays() {
    let mut random = Random::seeded(5);
    let damaged = std::iter::repeat_with(|| {
        let mut bytes = open();
        for _ in 0..random.below(3) {
            let at = if random.coin() { 64 + random.below(200) } else { random.below(64) };
            bytes[at as usize] ^= 1 << random.below(8);
        }
        bytes
    });
    let (mended_some, left) = verify_damaged(&Kit, damaged.take(4000));
    assert!(mended_some > 500 && left > 100, "{mended_some} {left}");
}
