//! Repairs on request: `instar check -r`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::Repair;
use instar_guest_sdk::random::Random;
use instar_testkit::crashes;
use instar_testkit::mended::{verify_crashes, verify_damaged, verify_failing_requests, verify_mended};
use instar_vdi_testkit::{build, le32, put32, Kit, Spec, State, BLOCK};

/// Where the header has `cBlocksAllocated`.
const ALLOCATED: usize = 388;

fn spec() -> Spec {
    Spec::new(50 * BLOCK, 2, 1).with([(0, State::Data(1)), (1, State::Data(2)), (9, State::Zero), (7, State::Data(3))])
}

fn counted(allocated: usize) -> Vec<u8> {
    let mut bytes = build(&spec());
    put32(&mut bytes, ALLOCATED, allocated);
    bytes
}

#[test]
fn the_number_of_slots_follows_the_map() {
    // The number, and what of it is mended, with corruptions and with leaks alone.
    for (allocated, all, leaks) in
        [(2, (1, 0), (0, 0)), (0, (1, 0), (0, 0)), (5, (0, 2), (0, 2)), (51, (1, 48), (1, 48))]
    {
        let bytes = counted(allocated);
        for (what, planned) in [(Repair::All, all), (Repair::Leaks, leaks)] {
            let mended = verify_mended(&Kit, &bytes, what);
            assert_eq!((mended.planned.corruptions, mended.planned.leaks), planned, "{allocated}");
            let right = if planned == (0, 0) { allocated } else { 3 };
            assert_eq!(le32(mended.bytes(), ALLOCATED) as usize, right);
            verify_failing_requests_if(planned != (0, 0), &bytes, what);
            // Nothing but the number differs, which is the one or the other.
            let is_worse = |was: &[u8], is: &[u8]| {
                let number = ALLOCATED..ALLOCATED + 4;
                let other =
                    was.len() != is.len() || (0..was.len()).any(|at| !number.contains(&at) && was[at] != is[at]);
                other || ![allocated, right].contains(&(le32(is, ALLOCATED) as usize))
            };
            verify_crashes(&Kit, &bytes, (what, crashes()), &is_worse);
        }
    }
    assert!(verify_mended(&Kit, &build(&spec()), Repair::All).io.log.is_empty());
}

fn verify_failing_requests_if(mends: bool, bytes: &[u8], what: Repair) {
    if mends {
        verify_failing_requests(&Kit, bytes, what);
    }
}

#[test]
fn what_has_no_right_answer_is_told_and_stays() {
    let damages: [(usize, usize, &str); 2] = [(512 + 20 * 4, 99, "past the end"), (512 + 20 * 4, 1, "the same place")];
    for (at, value, words) in damages {
        let mut bytes = counted(2);
        put32(&mut bytes, at, value);
        let mended = verify_mended(&Kit, &bytes, Repair::All);
        assert!(mended.io.log.is_empty() && mended.told[0].contains(words), "{:?}", mended.told);
    }
}

#[test]
fn whatever_is_damaged_what_was_readable_stays() {
    let mut random = Random::seeded(5);
    let whole = build(&spec());
    let damaged = std::iter::repeat_with(|| {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(2) {
            let at = [random.below(4) + ALLOCATED as u64, 512 + random.below(200), random.below(512)]
                [random.below(3) as usize];
            bytes[at as usize] ^= 1 << random.below(8);
        }
        bytes
    });
    let (mended_some, left) = verify_damaged(&Kit, damaged.take(4000));
    assert!(mended_some > 500 && left > 100, "{mended_some} {left}");
}
