//! Repairs on request: `instar check -r`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::Repair;
use instar_guest_sdk::random::Random;
use instar_testkit::mended::{mend, verify_crashes, verify_damaged, verify_failing_requests, verify_mended};
use instar_testkit::{crashes, ImageKit};
use instar_vhdx_testkit::{build, put64, Kind, Kit, Log, Spec, View, MIB};

const SIZE: usize = 2 * MIB - 8192;
/// Where the headers and the region tables stand.
const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
const REGIONS: [usize; 2] = [192 << 10, 256 << 10];
const HEADER: usize = HEADERS[1];
const REGION: usize = REGIONS[0];

fn spec(log: Log) -> Spec {
    let spec = Spec::new(Kind::Differencing, SIZE).with([(0, 3, 0x43), (3000, 40, 0x46)]);
    Spec { log, ..spec }
}

#[test]
fn a_log_is_replayed_and_a_copy_goes_over_its_damaged_other() {
    for log in [Log::Empty, Log::Pending] {
        for damaged in [None, Some(HEADERS[0]), Some(HEADERS[1]), Some(REGIONS[0]), Some(REGIONS[1])] {
            let mut bytes = build(&spec(log));
            if let Some(at) = damaged {
                bytes[at + 70] ^= 1;
            }
            // A log that only the damaged header names is none, and the log has the region tables.
            let before = View::new(&bytes);
            let shows = damaged.is_some_and(|at| HEADERS.contains(&at) || !before.is_dirty());
            let corruptions = u64::from(before.is_dirty()) + u64::from(shows);
            let want = before.content(&[1; SIZE]);
            let mended = verify_mended(&Kit, &bytes, Repair::All);
            assert_eq!((mended.planned.corruptions, mended.after.corruptions), (corruptions, 0), "{log:?} {damaged:?}");
            let after = View::new(mended.bytes());
            assert!(!after.is_dirty() && after.content(&[1; SIZE]) == want);
            // Images are long: a few of them show it.
            if matches!((log, damaged), (Log::Pending, None | Some(HEADER)) | (Log::Empty, Some(HEADER | REGION))) {
                verify_crashes(&Kit, &bytes, (Repair::All, crashes()), &|was, is| {
                    Kit.is_sound(was) && !Kit.is_sound(is)
                });
                verify_failing_requests(&Kit, &bytes, Repair::All);
            }
            assert!(mend(&Kit, &bytes, Repair::Leaks).unwrap().io.log.is_empty());
        }
    }
}

#[test]
fn what_has_no_right_answer_is_told_and_stays() {
    for (entry, words) in [(1 << 40 | 7, "past the end"), (6, "overlaps the header section"), (5, "no entry of such")] {
        let mut bytes = build(&spec(Log::Empty));
        let table = View::new(&bytes).table.0;
        put64(&mut bytes, table, entry);
        let mended = verify_mended(&Kit, &bytes, Repair::All);
        assert!(mended.io.log.is_empty() && mended.told[0].contains(words), "{:?}", mended.told);
        // A copy that is damaged is mended nevertheless.
        bytes[HEADERS[0] + 70] ^= 1;
        let mended = mend(&Kit, &bytes, Repair::All).unwrap();
        assert_eq!((mended.planned.corruptions, mended.after.corruptions), (1, 1));
    }
}

#[test]
fn whatever_is_damaged_what_was_readable_stays() {
    let mut random = Random::seeded(5);
    let images = [build(&spec(Log::Empty)), build(&spec(Log::Pending))];
    let damaged = std::iter::repeat_with(|| {
        let mut bytes = random.pick(&images).clone();
        let table = View::read(&bytes).map_or(3 << 20, |view| view.table.0);
        for _ in 0..=random.below(2) {
            let place = *random.pick(&[HEADERS[0], HEADERS[1], REGIONS[0], REGIONS[1], table]);
            bytes[place + random.below(80) as usize] ^= 1 << random.below(8);
        }
        bytes
    });
    let (mended_some, left) = verify_damaged(&Kit, damaged.take(100));
    assert!(mended_some > 10 && left > 2, "{mended_some} {left}");
}
