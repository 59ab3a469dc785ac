//! Bitmaps of the overlay that are merged into those of the backing, and made there: at every instant of a power loss.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::crash::Files;
use instar_guest_sdk::memory::MemoryDevices;
use instar_qcow2_testkit::bitmaps::{bitmaps, BitmapSpec, Bits, AUTO};
use instar_qcow2_testkit::builder::{build, Spec};
use instar_qcow2_testkit::checker::check;
use instar_qcow2_testkit::header::{backing_name, extensions, with_header, BACKING_FORMAT, FEATURE_NAMES};
use instar_qcow2_testkit::pair::{data, is_dirty, views};
use instar_qcow2_testkit::{be64, run_commit, ANCESTOR, OVERLAY};
use instar_testkit::crashes;
use std::slice::from_ref;

const MERGE: Options = Options {
    keep_overlay: false,
    dry_run: false,
    resize_backing: false,
    bitmaps: true,
    disabled_bitmaps: false,
    new_target: false,
};

/// Which granules a bitmap calls dirty.
fn granules(bits: &[bool]) -> Vec<usize> {
    bits.iter().enumerate().filter(|(_, bit)| **bit).map(|(index, _)| index).collect()
}

/// A backing with `own` bitmaps, and an overlay with one more, with clusters of 2^`bits` bytes.
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

const BITMAPS: u32 = 0x2385_2875;

/// The type of a header extension, and its data.
type Extension = (u32, Vec<u8>);

/// A backing over an ancestor of its own: its header has these extensions, and then the ancestor's name.
fn over(bits: u32, all: &[Extension], name: &[u8]) -> Files {
    let mut files = files(bits, 0);
    let backing = with_header(files[&DEVICE_OUTPUT].clone(), all, 8, name);
    files.insert(DEVICE_OUTPUT, backing);
    files.insert(ANCESTOR, build(&Spec::new(bits, 200 << bits).with(data([1, 2, 100], 0x55))));
    files
}

/// The extensions that are not about bitmaps.
fn others(bytes: &[u8]) -> Vec<Extension> {
    extensions(bytes).into_iter().filter(|e| e.0 != BITMAPS).map(|(kind, _, data)| (kind, data)).collect()
}

/// What the header says besides bitmaps stays at every instant, wherever the name is moved to.
fn every_crash_point_over(before: &Files) {
    let header = |files: &Files| (backing_name(&files[&DEVICE_OUTPUT]), others(&files[&DEVICE_OUTPUT]));
    let ((_, overlay), said) = (views(before), header(before));
    let (mut bare, mut whole) = (0, 0);
    let io = merged(before, before);
    crashes().each(before, &io.log, &mut |state: Files| {
        assert_eq!(header(&state), said);
        assert!(views(&state).1 == overlay, "the overlay reads something else");
        for file in state.values().filter(|file| !is_dirty(file)) {
            assert_eq!(check(file).errors, Vec::<String>::new());
        }
        match bitmaps(&state[&DEVICE_OUTPUT]).as_slice() {
            [] => bare += 1,
            // It has all its bits as soon as it is there.
            [one] => {
                let own = &bitmaps(&before[&OVERLAY])[0];
                assert!(granules(&own.bits).iter().all(|&number| one.bits[number]), "the bitmap lacks bits");
                whole += 1;
            }
            more => panic!("{} bitmaps", more.len()),
        }
        let again = merged(before, &state);
        assert_eq!(header(&again.files), said);
        assert!(views(&again.files).1 == overlay, "running again gives something else");
    });
    assert!(bare > 5 && whole > 1, "{bare} states without the bitmap, {whole} with it");
}

#[test]
fn every_crash_point_of_a_name_that_is_moved() {
    let format = (BACKING_FORMAT, b"qcow2".to_vec());
    let all = [format.clone(), (FEATURE_NAMES, vec![7; 384]), (0x1234_5678, b"unknown".to_vec())];
    let cases: [(u32, &[Extension], usize); 6] = [
        (9, &[], 9),
        (9, from_ref(&format), 9),
        (9, from_ref(&format), 100),
        (12, &all, 9),
        (12, &all, 1023),
        (12, &[], 24),
    ];
    for (bits, extensions, length) in cases {
        let before = over(bits, extensions, &b"x".repeat(length));
        let io = merged(&before, &before);
        let (old, new) = (be64(&before[&DEVICE_OUTPUT], 8), be64(&io.files[&DEVICE_OUTPUT], 8));
        assert!(new >= old + 32, "the name was not in the way");
        every_crash_point_over(&before);
    }
}

#[test]
fn every_crash_point_of_an_extension_that_does_not_count() {
    // The bit was cleared by a program that does not know bitmaps: the directory is nobody's.
    let mut stale = vec![0, 0, 0, 3, 0, 0, 0, 0];
    stale.extend([0xee; 16]);
    every_crash_point_over(&over(12, &[(BACKING_FORMAT, b"qcow2".to_vec()), (BITMAPS, stale)], b"base.qcow2"));
}

#[test]
fn no_room_in_the_header() {
    let format = || (BACKING_FORMAT, b"qcow2".to_vec());
    let cases = [
        // The name and its copy do not fit, or not even the extension does.
        (9, vec![format()], 200),
        (9, vec![(FEATURE_NAMES, vec![7; 368])], 9),
        (12, vec![(FEATURE_NAMES, vec![7; 2200])], 1023),
    ];
    for (bits, extensions, length) in cases {
        let mut io = MemoryDevices::new(over(bits, &extensions, &b"x".repeat(length)));
        let before = io.files.clone();
        let failed = run_commit(&mut io, MERGE).unwrap_err();
        assert!(failed.error.text.contains("the header has no room to refer to bitmaps"), "{:?}", failed.error);
        assert!(io.files == before, "a refused commit changed a file");
    }
}
