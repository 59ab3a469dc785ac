//! What is found in an image, by a check and before a commit.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{CheckSummary, ErrorCode};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{FormatDriver, Source};
use instar_vhd_driver::Vhd;
use instar_vhd_testkit::{be32, build, device, put32, put64, seal, Kind, Spec, View};

const SIZE: usize = 40 * 8192;

fn spec() -> Spec {
    Spec::new(Kind::Differencing, SIZE, 8192).with([(0, 3, 0x43), (16, 16, 0x44), (100, 1, 0x45), (600, 40, 0x46)])
}

fn check(bytes: &[u8]) -> (CheckSummary, Vec<String>) {
    let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
    let mut source = Vhd::open_source(&mut io, &device(0, bytes, u64::MAX)).unwrap();
    let mut lines = Vec::new();
    let summary = source.check(&mut io, &mut |kind, text| lines.push(format!("{kind:?}: {text}"))).unwrap();
    let corruptions = lines.iter().filter(|line| line.starts_with("Corruption")).count() as u64;
    assert_eq!((summary.corruptions, io.log.len()), (corruptions, 0));
    (summary, lines)
}

#[test]
fn a_sound_image_is_counted() {
    for batmap in [false, true] {
        let bytes = build(&Spec { batmap, ..spec() });
        let (summary, lines) = check(&bytes);
        assert_eq!(lines, Vec::<String>::new());
        assert_eq!((summary.allocated_clusters, summary.total_clusters), (6, 40));
        assert_eq!((summary.image_end_offset, summary.leaks), (bytes.len() as u64 - 512, 0));
        assert_eq!(summary.fragmented_clusters, 5, "the blocks stand in the file from the last to the first");
    }
}

#[test]
fn each_damage_is_told_and_refused() {
    type Damage = (&'static str, bool, fn(&mut Vec<u8>, usize));
    let damages: [Damage; 7] = [
        ("past the end of the file", true, |bytes, table| put32(bytes, table, 1 << 30)),
        ("overlaps the copy of the footer", true, |bytes, table| put32(bytes, table, 0)),
        ("overlaps the block allocation table", true, |bytes, table| put32(bytes, table, table / 512)),
        ("overlaps the one before it", true, |bytes, table| {
            let other = be32(bytes, table + 4);
            put32(bytes, table + 8, other + 1);
        }),
        ("overlaps the parent locator", true, |bytes, _| {
            put64(bytes, 512 + 576 + 24 + 16, 1537);
            seal(bytes, 512, 1024, 36);
        }),
        ("is missing", false, |bytes, _| {
            let end = bytes.len() - 512;
            bytes[end] = 0;
        }),
        ("in front of the file is damaged", false, |bytes, _| bytes[0] = 0),
    ];
    for (words, refused, damage) in damages {
        let mut bytes = build(&spec());
        let table = View::new(&bytes).table.0;
        let config = device(0, &bytes, u64::MAX);
        damage(&mut bytes, table);
        let mut io = MemoryDevices::new([(0, bytes)]);
        let mut source = Vhd::open_source(&mut io, &config).unwrap();
        let mut lines = Vec::new();
        source.check(&mut io, &mut |_, text| lines.push(text.to_owned())).unwrap();
        assert!(lines.iter().any(|line| line.contains(words)), "{words}: {lines:?}");
        let verified = Vhd::open_source(&mut io, &config).unwrap().verify(&mut io, true);
        assert_eq!(
            verified.as_ref().err().map(|error| error.code),
            refused.then_some(ErrorCode::OverlayCorrupt),
            "{words}"
        );
    }
}

#[test]
fn a_batmap_that_is_wrong_is_told_and_not_believed() {
    let good = Spec { batmap: true, ..spec() };
    let mut bytes = build(&good);
    let at = View::new(&bytes).batmap().unwrap().0 + 512;
    let want = View::new(&bytes).content(&[1; SIZE]);
    // Block 0 is said to be full.
    bytes[at] |= 0x80;
    let (_, lines) = check(&bytes);
    assert!(lines.len() == 1 && lines[0].contains("checksum of the batmap"), "{lines:?}");
    assert!(View::new(&bytes).content(&[1; SIZE]) == want);
    let sum: u32 = bytes[at..at + 512].iter().map(|&byte| u32::from(byte)).sum();
    put32(&mut bytes, at - 512 + 24, !sum as usize);
    let (_, lines) = check(&bytes);
    assert!(lines.len() == 1 && lines[0].contains("says that block 0 is full"), "{lines:?}");
    let mut io = MemoryDevices::new([(0, bytes.clone())]);
    let mut source = Vhd::open_source(&mut io, &device(0, &bytes, u64::MAX)).unwrap();
    assert_eq!(source.verify(&mut io, true).unwrap_err().code, ErrorCode::OverlayCorrupt);
}

#[test]
fn lost_space_is_told() {
    let mut bytes = build(&Spec { gap: 100, ..spec() });
    let (summary, lines) = check(&bytes);
    assert!(summary.leaks > 20 && lines[0].starts_with("Leak: room for"), "{summary:?} {lines:?}");
    let footer = bytes.split_off(bytes.len() - 512);
    let end = bytes.len() as u64;
    bytes.resize(bytes.len() + 100_000, 0);
    bytes.extend(footer);
    let (summary, _) = check(&bytes);
    assert_eq!((summary.image_end_offset, summary.unused_tail), (end, 100_000 / 8192 * 8192));
}
