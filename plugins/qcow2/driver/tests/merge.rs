//! Bitmaps of the overlay that are merged into those of the backing, and made there: at every instant of a power loss.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::crash::Files;
use instar_guest_sdk::memory::MemoryDevices;
use instar_qcow2_testkit::bitmaps::{bitmaps, BitmapSpec, Bits, AUTO};
use instar_qcow2_testkit::builder::{build, Spec};
use instar_qcow2_testkit::checker::check;
use instar_qcow2_testkit::pair::{data, is_dirty, views};
use instar_qcow2_testkit::{run_commit, OVERLAY};
use instar_testkit::crashes;

const MERGE: Options = Options { keep_overlay: false, dry_run: false, resize_backing: false, bitmaps: true };

/// Which granules a bitmap calls dirty.
fn granules(bits: &[bool]) -> Vec<usize> {
    bits.iter().enumerate().filter(|(_, bit)| **bit).map(|(index, _)| index).collect()
}

/// A backing with so many bitmaps, and an overlay with one more of its own.
fn files(bits: u32, own: usize) -> Files {
    let bitmap = |byte| BitmapSpec::new(AUTO, bits, &[Bits::Bytes(byte)]);
    let size = 200 << bits;
    let overlay = Spec { bitmaps: vec![bitmap(0x21); own + 1], autoclear: 1, ..Spec::new(bits, size) };
    let autoclear = u64::from(own > 0);
    let backing = Spec { bitmaps: vec![bitmap(0x42); own], autoclear, ..Spec::new(bits, size) };
    let (overlay, backing) = (overlay.with(data([0, 64, 150], 0x21)), backing.with(data([1, 64], 0x43)));
    [(OVERLAY, build(&overlay)), (DEVICE_OUTPUT, build(&backing))].into()
}

/// Commits, and holds the bitmaps against those of before.
fn merged(before: &Files, files: &Files) -> MemoryDevices {
    let mut io = MemoryDevices::new(files.clone());
    run_commit(&mut io, MERGE).unwrap();
    let (source, old) = (bitmaps(&before[&OVERLAY]), bitmaps(&before[&DEVICE_OUTPUT]));
    let now = bitmaps(&io.files[&DEVICE_OUTPUT]);
    assert_eq!(now.len(), source.len(), "a bitmap was not made");
    for (index, bitmap) in now.iter().enumerate() {
        assert_eq!(bitmap.flags, AUTO);
        let claimed = |number: usize| source[index].bits[number] || old.get(index).is_some_and(|old| old.bits[number]);
        for number in 0..bitmap.bits.len() {
            assert!(bitmap.bits[number] || !claimed(number), "bitmap {index} lacks granule {number}");
        }
    }
    assert_eq!(check(&io.files[&DEVICE_OUTPUT]).errors, Vec::<String>::new());
    io
}

#[test]
fn every_crash_point() {
    for (bits, own) in [(9, 0), (9, 2), (12, 0), (12, 1)] {
        let before = files(bits, own);
        let (_, overlay) = views(&before);
        let io = merged(&before, &before);
        // One that is made says exactly what the overlay's says.
        let (source, now) = (bitmaps(&before[&OVERLAY]), bitmaps(&io.files[&DEVICE_OUTPUT]));
        assert_eq!(granules(&now[own].bits), granules(&source[own].bits));
        let report = check(&io.files[&DEVICE_OUTPUT]);
        assert_eq!((report.errors, report.leaks), (vec![], check(&before[&DEVICE_OUTPUT]).leaks));
        let states = crashes().each(&before, &io.log, &mut |state: Files| {
            assert!(views(&state).1 == overlay, "the overlay reads something else");
            for file in state.values().filter(|file| !is_dirty(file)) {
                assert_eq!(check(file).errors, Vec::<String>::new());
            }
            let there = bitmaps(&state[&DEVICE_OUTPUT]).len();
            assert!(there == own || there == own + 1, "{there} bitmaps");
            let again = merged(&before, &state);
            assert!(views(&again.files).1 == overlay, "running again gives something else");
        });
        assert!(states > 10, "only {states} states");
    }
}
