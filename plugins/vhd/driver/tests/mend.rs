//! Repairs on request: `instar check -r`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{device_flags, Repair, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::random::Random;
use instar_testkit::crashes;
use instar_testkit::mended::{mend, repair_on, verify_crashes, verify_damaged, verify_failing_requests, verify_mended};
use instar_testkit::ImageKit;
use instar_vhd_testkit::{build, put32, Kind, Kit, Spec, View};

const SIZE: usize = 40 * 8192;

fn spec() -> Spec {
    Spec::new(Kind::Differencing, SIZE, 8192).with([(0, 3, 0x43), (16, 16, 0x44), (100, 1, 0x45), (600, 40, 0x46)])
}

fn whole(bytes: &[u8]) -> bool {
    Kit.is_sound(bytes) && !Kit.is_dirty(bytes)
}

/// Nothing that was sound is not.
fn is_worse(was: &[u8], is: &[u8]) -> bool {
    Kit.is_sound(was) && !Kit.is_sound(is)
}

type Damage = fn(&mut Vec<u8>);

#[test]
fn the_copy_that_is_right_is_written_over_the_other() {
    let damages: [(Damage, u64, u64); 5] = [
        (|bytes| bytes[0] = 0, 1, 0),
        (|bytes| bytes[..512].fill(0x5a), 1, 0),
        (
            |bytes| {
                let end = bytes.len() - 512;
                bytes[end..].fill(0x5a);
            },
            0,
            1,
        ),
        // A block overwrote it, and the file ends with that.
        (|bytes| bytes.truncate(bytes.len() - 512), 0, 1),
        // The checksum of the batmap is wrong as well.
        (
            |bytes| {
                let at = View::new(bytes).batmap().unwrap().0 + 512;
                bytes[at] ^= 0x40;
                bytes[0] = 0;
            },
            1,
            1,
        ),
    ];
    for (damage, corruptions, leaks) in damages {
        let mut bytes = build(&Spec { batmap: true, ..spec() });
        let want = View::new(&bytes).content(&[1; SIZE]);
        damage(&mut bytes);
        let mended = verify_mended(&Kit, &bytes, Repair::All);
        assert_eq!((mended.before.corruptions, mended.before.leaks), (corruptions, leaks));
        assert_eq!((mended.planned.corruptions, mended.planned.leaks), (corruptions, leaks), "{:?}", mended.told);
        assert!(whole(mended.bytes()));
        assert!(View::new(mended.bytes()).content(&[1; SIZE]) == want);
        verify_crashes(&Kit, &bytes, (Repair::All, crashes()), &is_worse);
        verify_failing_requests(&Kit, &bytes, Repair::All);
        // What a crash leaves goes with the leaks, and what is damaged stays.
        let mended = verify_mended(&Kit, &bytes, Repair::Leaks);
        assert_eq!((mended.planned.corruptions, mended.planned.leaks), (0, leaks), "{:?}", mended.told);
        assert_eq!((mended.after.corruptions, mended.after.leaks), (corruptions, 0));
        assert_eq!(whole(mended.bytes()), corruptions == 0);
        verify_crashes(&Kit, &bytes, (Repair::Leaks, crashes()), &is_worse);
    }
}

#[test]
fn a_device_has_no_room_for_a_footer_but_its_last_sector() {
    let mut bytes = build(&spec());
    let end = bytes.len() - 512;
    bytes[end] = 0;
    let repair = |bytes: &[u8]| {
        let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.to_vec())]);
        let (planned, told) = repair_on(&Kit, &mut io, Repair::All, device_flags::FIXED_LENGTH).unwrap();
        (planned.leaks, told, io)
    };
    let (mended, _, io) = repair(&bytes);
    assert!(mended == 1 && whole(&io.files[&DEVICE_OUTPUT]));
    bytes.truncate(end);
    let (mended, told, io) = repair(&bytes);
    assert!(mended == 0 && told[0].contains("over a block") && io.log.is_empty(), "{told:?}");
}

#[test]
fn what_has_no_right_answer_is_told_and_stays() {
    type Edit = fn(&mut Vec<u8>, usize);
    let edits: [(Edit, &str); 3] = [
        (|bytes, table| put32(bytes, table, 1 << 30), "past the end of the file"),
        (|bytes, table| put32(bytes, table, 0), "overlaps the copy of the footer"),
        (
            |bytes, _| {
                let at = View::new(bytes).batmap().unwrap().0 + 512;
                bytes[at] |= 0x80;
                let sum: u32 = bytes[at..at + 512].iter().map(|&byte| u32::from(byte)).sum();
                put32(bytes, at - 512 + 24, !sum as usize);
            },
            "says that block 0 is full",
        ),
    ];
    for (edit, words) in edits {
        let mut bytes = build(&Spec { batmap: true, ..spec() });
        let table = View::new(&bytes).table.0;
        edit(&mut bytes, table);
        let mended = verify_mended(&Kit, &bytes, Repair::All);
        assert!(mended.io.log.is_empty() && mended.told[0].contains(words), "{:?}", mended.told);
        // The other copy of the footer does not go over what nobody understands.
        let end = bytes.len() - 512;
        bytes[end] = 0;
        let mended = mend(&Kit, &bytes, Repair::All).unwrap();
        assert!(mended.io.log.is_empty(), "{words}: {:?}", mended.planned);
    }
}

#[test]
fn whatever_is_damaged_what_was_readable_stays() {
    let mut random = Random::seeded(5);
    let images =
        [build(&spec()), build(&Spec { batmap: true, gap: 3, ..spec() }), build(&Spec { tail: false, ..spec() })];
    let damaged = std::iter::repeat_with(|| {
        let mut bytes = random.pick(&images).clone();
        for _ in 0..=random.below(2) {
            let end = [512, 4096, bytes.len() as u64][random.below(3) as usize];
            let at =
                (if random.coin() { random.below(end) } else { bytes.len() as u64 - 1 - random.below(512) }) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        bytes
    });
    let (mended_some, left) = verify_damaged(&Kit, damaged.take(4000));
    assert!(mended_some > 500 && left > 10, "{mended_some} {left}");
}
