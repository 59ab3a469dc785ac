//! What is found in an image, by a check and before a commit; what hostile images cost.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{CheckSummary, DeviceConfig, ErrorCode};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{Extents, FormatDriver, Source};
use instar_vhdx_driver::Vhdx;
use instar_vhdx_testkit::{build, device, entry, le64, put32, put64, seal, Change, Kind, Log, Spec, View, MIB};

const SIZE: usize = 5 * MIB - 8192;

fn spec() -> Spec {
    Spec::new(Kind::Differencing, SIZE).with([(0, 3, 0x43), (2048, 2048, 0x44), (9000, 40, 0x46)])
}

fn check(bytes: &[u8]) -> (CheckSummary, Vec<String>) {
    let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
    let mut source = Vhdx::open_source(&mut io, &device(0, bytes, u64::MAX)).unwrap();
    let mut lines = Vec::new();
    let summary = source.check(&mut io, &mut |kind, text| lines.push(format!("{kind:?}: {text}"))).unwrap();
    let corruptions = lines.iter().filter(|line| line.starts_with("Corruption")).count() as u64;
    assert_eq!((summary.corruptions, io.log.len()), (corruptions, 0));
    (summary, lines)
}

#[test]
fn a_sound_image_is_counted() {
    for log in [Log::Empty, Log::Pending, Log::Stale] {
        let bytes = build(&Spec { log, ..spec() });
        let (summary, lines) = check(&bytes);
        assert_eq!(lines, Vec::<String>::new());
        assert_eq!((summary.allocated_clusters, summary.total_clusters), (3, 5));
        assert_eq!((summary.image_end_offset, summary.leaks), (bytes.len() as u64, 0));
        assert_eq!(summary.fragmented_clusters, 2, "the blocks stand in the file from the last to the first");
    }
    let (summary, lines) = check(&build(&Spec { gap: 2, tail: 3, ..spec() }));
    assert!(lines.len() == 1 && lines[0].starts_with("Leak: room for 8 blocks"), "{lines:?}");
    assert_eq!((summary.leaks, summary.unused_tail), (8, 3 << 20));
    assert_eq!(check(&build(&Spec { states: vec![(4, 3 | 7 << 20)], ..spec() })).1, Vec::<String>::new());
}

#[test]
fn each_damage_is_told_and_refused() {
    type Damage = (&'static str, bool, fn(&mut Vec<u8>, usize));
    const RATIO: usize = 4096;
    let damages: [Damage; 11] = [
        ("past the end of the file", true, |bytes, table| put64(bytes, table, 1 << 40 | 7)),
        ("overlaps the header section", true, |bytes, table| put64(bytes, table, 6)),
        ("overlaps the log", true, |bytes, table| put64(bytes, table, 1 << 20 | 6)),
        ("overlaps the metadata", true, |bytes, table| put64(bytes, table, 2 << 20 | 6)),
        ("overlaps the block allocation table", true, |bytes, table| put64(bytes, table, 3 << 20 | 6)),
        ("taken already", true, |bytes, table| {
            let other = le64(bytes, table + 8);
            put64(bytes, table, other);
        }),
        ("no entry of such a disk may be", true, |bytes, table| put64(bytes, table, 5)),
        ("no entry of such a disk may be", true, |bytes, table| put64(bytes, table, 5 << 20 | 6 | 8)),
        ("its sector bitmap is not there", true, |bytes, table| put64(bytes, table + RATIO * 8, 0)),
        ("one of the two headers is damaged", false, |bytes, _| bytes[64 << 10] = 0),
        ("one of the two region tables is damaged", false, |bytes, _| bytes[256 << 10] = 0),
    ];
    for (words, refused, damage) in damages {
        let mut bytes = build(&spec());
        let table = View::new(&bytes).table.0;
        let config = device(0, &bytes, u64::MAX);
        damage(&mut bytes, table);
        let mut io = MemoryDevices::new([(0, bytes)]);
        let mut source = Vhdx::open_source(&mut io, &config).unwrap();
        let mut lines = Vec::new();
        source.check(&mut io, &mut |_, text| lines.push(text.to_owned())).unwrap();
        assert!(lines.iter().any(|line| line.contains(words)), "{words}: {lines:?}");
        let verified = Vhdx::open_source(&mut io, &config).unwrap().verify(&mut io, true);
        let code = verified.as_ref().err().map(|error| error.code);
        assert_eq!(code, refused.then_some(ErrorCode::OverlayCorrupt), "{words}");
    }
}

/// An image without a parent has no sector bitmaps, and no block that is there in part.
#[test]
fn what_only_a_differencing_disk_has_is_refused_elsewhere() {
    for (at, entry) in [(0, 4 << 20 | 7), (4096, 4 << 20 | 6)] {
        let size = 4098 * MIB;
        let mut bytes = build(&Spec::new(Kind::Dynamic, size).with([(0, 8, 1)]));
        let table = View::new(&bytes).table.0;
        put64(&mut bytes, table + at * 8, entry);
        let config = device(0, &bytes, u64::MAX);
        let mut io = MemoryDevices::new([(0, bytes)]);
        let mut source = Vhdx::open_source(&mut io, &config).unwrap();
        let error = source.verify(&mut io, false).unwrap_err();
        assert!(error.text.contains("no entry of such a disk may be"), "{error}");
    }
}

fn opened(bytes: Vec<u8>, config: &DeviceConfig) -> Result<(), String> {
    let mut io = MemoryDevices::new([(0, bytes)]);
    let result = Vhdx::open_source(&mut io, config).map(|_| ()).map_err(|error| error.text);
    assert!(io.bytes_read < 8 << 20, "{} bytes were read", io.bytes_read);
    result
}

/// Put an entry into the log, and let it count.
fn with_log(changes: &[Change], lengths: [u64; 2], header: impl Fn(&mut [u8])) -> Result<(), String> {
    let mut bytes = build(&spec());
    let config = device(0, &bytes, u64::MAX);
    let made = entry(changes, 9, 0, [0x77; 16], lengths);
    bytes[MIB..MIB + made.len()].copy_from_slice(&made);
    let at = 128 << 10;
    bytes[at + 48..at + 64].fill(0x77);
    header(&mut bytes[at..at + 4096]);
    seal(&mut bytes, at, 4096);
    opened(bytes, &config)
}

#[test]
fn hostile_logs_are_refused_in_one_line() {
    let length = build(&spec()).len() as u64;
    let page = |at: usize| Change::Page(at, vec![7; 4096]);
    let refused = |changes: &[Change], lengths, words: &str| {
        let text = with_log(changes, lengths, |_| {}).unwrap_err();
        assert!(text.contains(words), "{text}");
    };
    assert_eq!(with_log(&[], [length; 2], |_| {}), Ok(()));
    refused(&[page(128 << 10)], [length; 2], "in a header or in the log");
    refused(&[page(0)], [length; 2], "in a header or in the log");
    refused(&[page(MIB + 4096)], [length; 2], "in a header or in the log");
    refused(&[Change::Zero(256 << 10, 2 * MIB)], [length; 2], "in a header or in the log");
    refused(&[Change::Zero(3 * MIB, usize::MAX / 8192 * 4096)], [length; 2], "no VHDX needs that");
    refused(&[], [length + MIB as u64, length], "when it was last written");
    refused(&[page(192 << 10), page(256 << 10)], [length; 2], "neither of the two region tables");
    refused(&[Change::Zero(2 * MIB, 4096)], [length; 2], "no signature");
    let header = |put: fn(&mut [u8]), words: &str| {
        let text = with_log(&[], [length; 2], put).unwrap_err();
        assert!(text.contains(words), "{text}");
    };
    header(|bytes| bytes[48..64].fill(0x78), "no valid sequence");
    header(|bytes| put32(bytes, 68, 0xfff0_0000), "goes past the end of the file");
    header(|bytes| put64(bytes, 72, 3 << 20), "no valid sequence");
    header(|bytes| bytes[64] = 1, "version 1 of the log");
}

/// A log that claims 4 GiB, all of it a hole: an empty one is not read, and one that is to be replayed is refused unread.
#[test]
fn a_log_of_four_gib_costs_nothing() {
    let mut bytes = build(&spec());
    let config = DeviceConfig { file_length: 1 << 40, ..device(0, &bytes, u64::MAX) };
    for (guid, words) in [(0, None), (0x77, Some("attach it once"))] {
        for at in [64 << 10, 128 << 10] {
            bytes[at + 48..at + 64].fill(guid);
            put32(&mut bytes, at + 68, 0xfff0_0000);
            put64(&mut bytes, at + 72, 1 << 30);
            seal(&mut bytes, at, 4096);
        }
        let result = opened(bytes.clone(), &config);
        match words {
            None => assert_eq!(result, Ok(())),
            Some(words) => assert!(result.unwrap_err().contains(words)),
        }
    }
}

/// The largest disk has 512 MiB of table; in a hole, none of it is read.
#[test]
fn a_table_in_a_hole_costs_nothing() {
    let mut bytes = build(&Spec::new(Kind::Differencing, MIB));
    let view = View::new(&bytes);
    let (table, metadata, size) = (view.table.0, view.metadata, 64 << 40);
    put64(&mut bytes, metadata + 65536 + 8, size);
    for at in [192 << 10, 256 << 10] {
        put32(&mut bytes, at + 16 + 24, 1 << 30);
        seal(&mut bytes, at, 65536);
    }
    let mut io = MemoryDevices::new([(0, bytes)]);
    io.holes = true;
    let config = DeviceConfig {
        file_length: 2 << 30,
        max_length: u64::MAX,
        virtual_size: size,
        cluster_size: 1 << 20,
        ..DeviceConfig::default()
    };
    let mut source = Vhdx::open_source(&mut io, &config).unwrap();
    assert_eq!(source.verify(&mut io, true).unwrap(), 0);
    let mut extents = Extents::with_room_for(9);
    assert_eq!(source.extents(&mut io, 0..size, &mut extents).unwrap(), size);
    assert!(extents.is_empty() && table == 3 * MIB);
    assert!(io.executed() < 30 && io.bytes_read < 1 << 20, "{} requests, {} bytes", io.executed(), io.bytes_read);
}

#[test]
fn what_the_host_saw_must_still_be_there() {
    let bytes = build(&spec());
    let config = device(0, &bytes, u64::MAX);
    for changed in [
        DeviceConfig { virtual_size: config.virtual_size + 512, ..config },
        DeviceConfig { cluster_size: config.cluster_size * 2, ..config },
    ] {
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        assert_eq!(Vhdx::open_source(&mut io, &changed).unwrap_err().code, ErrorCode::HeaderMismatch);
    }
}
