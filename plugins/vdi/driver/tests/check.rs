//! What a check finds, and that the work follows from what the files hold.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{CheckSummary, DeviceConfig, ErrorCode, FindingKind};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{Extents, FormatDriver, ReadBelow, Source};
use instar_guest_view::Ancestors;
use instar_vdi_driver::Vdi;
use instar_vdi_testkit::{build, device, fill, put32, Spec, State, BLOCK};

fn checked(bytes: &[u8]) -> (CheckSummary, Vec<(FindingKind, String)>) {
    let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
    let mut source = Vdi::open_source(&mut io, &device(0, bytes, u64::MAX)).unwrap();
    let mut findings = Vec::new();
    let summary = source.check(&mut io, &mut |kind, text| findings.push((kind, text.to_owned()))).unwrap();
    assert!(io.log.is_empty());
    (summary, findings)
}

fn spec() -> Spec {
    Spec::new(50 * BLOCK, 2, 1).with([(0, State::Data(1)), (1, State::Data(2)), (9, State::Zero), (7, State::Data(3))])
}

#[test]
fn a_good_image_is_counted() {
    let bytes = build(&spec());
    let (summary, findings) = checked(&bytes);
    assert_eq!(findings, []);
    assert_eq!((summary.total_clusters, summary.allocated_clusters, summary.fragmented_clusters), (50, 3, 0));
    assert_eq!((summary.image_end_offset, summary.unused_tail), (bytes.len() as u64, 0));
    let swapped = spec().with([(3, State::Data(4))]);
    assert_eq!(checked(&build(&swapped)).0.fragmented_clusters, 2);
    let longer = [bytes, vec![0; 2 * BLOCK + 5]].concat();
    assert_eq!(checked(&longer).0.unused_tail, 2 * BLOCK as u64);
}

#[test]
fn each_kind_of_damage_has_its_words() {
    let damaged = |damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = build(&spec());
        damage(&mut bytes);
        let (summary, findings) = checked(&bytes);
        let count = |kind| findings.iter().filter(|(other, _)| *other == kind).count() as u64;
        assert_eq!(summary.corruptions, count(FindingKind::Corruption), "{findings:?}");
        assert_eq!(summary.leaks > 0, count(FindingKind::Leak) > 0, "{findings:?}");
        (summary.corruptions, summary.leaks, findings)
    };
    type Case<'a> = (&'a dyn Fn(&mut Vec<u8>), u64, u64, &'a str);
    let cases: [Case<'_>; 6] = [
        (&|bytes| put32(bytes, 512 + 20 * 4, 99), 1, 0, "block 20 of the disk is in slot 99, past the end of the file"),
        (&|bytes| put32(bytes, 512 + 20 * 4, 1), 1, 0, "block 20 of the disk lies in the same place as another one"),
        (&|bytes| put32(bytes, 388, 2), 1, 0, "cBlocksAllocated is 2, and slot 2 is used"),
        (&|bytes| put32(bytes, 388, 51), 1, 48, "VirtualBox refuses that"),
        (&|bytes| put32(bytes, 388, 5), 0, 2, "2 of 5 slots are used by no block"),
        (&|bytes| put32(bytes, 512, 0xffff_ffff), 0, 1, "1 of 3 slots are used by no block"),
    ];
    for (damage, corruptions, leaks, text) in cases {
        let (has, lost, findings) = damaged(damage);
        assert_eq!(has, corruptions, "{text}: {findings:?}");
        // A slot that two blocks share is counted twice.
        assert!(lost == leaks || text.contains("same place"), "{text}: {findings:?}");
        assert!(findings.iter().any(|(_, found)| found.contains(text)), "{text}: {findings:?}");
    }
    // Entries past the end of the disk.
    let mut bytes = build(&Spec { entries: 60, ..spec() });
    put32(&mut bytes, 512 + 55 * 4, 0xffff_fffe);
    let (summary, findings) = checked(&bytes);
    assert_eq!((summary.corruptions, summary.leaks), (0, 1), "{findings:?}");
}

#[test]
fn a_map_in_a_hole_is_not_gone_through() {
    // A hundred thousand entries that name the first slot.
    let mut bytes = build(&Spec { entries: 100_000, ..spec() });
    bytes[512..512 + 400_000].fill(0);
    let (summary, findings) = checked(&bytes);
    assert_eq!((summary.corruptions, findings.len()), (100, 101));
    let mut io = MemoryDevices::new([(0, bytes.clone())]);
    let mut source = Vdi::open_source(&mut io, &device(0, &bytes, u64::MAX)).unwrap();
    assert_eq!(source.verify(&mut io, false).unwrap_err().code, ErrorCode::OverlayCorrupt);
    assert!(io.bytes_read < 100_000, "{} bytes", io.bytes_read);
    // Nor by somebody who asks for its extents without a look at all of it.
    let error = source.extents(&mut io, 0..50 * BLOCK as u64, &mut Extents::with_room_for(9)).unwrap_err();
    assert!(error.text.contains("same place as the one before"), "{error}");
}

#[test]
fn a_long_file_takes_no_more_than_its_map() {
    let bytes = build(&spec());
    let work = |length: u64| {
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        let config = DeviceConfig { file_length: length, ..device(0, &bytes, u64::MAX) };
        Vdi::open_source(&mut io, &config).unwrap().verify(&mut io, true).unwrap();
        (io.executed(), io.bytes_read)
    };
    assert_eq!(work(bytes.len() as u64), work(1 << 50));
    // An entry that names a slot far behind is found, and one in the same place, too.
    let mut far = bytes.clone();
    put32(&mut far, 512 + 30 * 4, 0xf000_0000);
    put32(&mut far, 512 + 40 * 4, 0xf000_0000);
    let mut io = MemoryDevices::new([(0, far.clone())]);
    let config = DeviceConfig { file_length: 1 << 50, ..device(0, &far, u64::MAX) };
    let error = Vdi::open_source(&mut io, &config).unwrap().verify(&mut io, true).unwrap_err();
    assert!(error.text.contains("same place"), "{error}");
}

#[test]
fn filling_a_gap_reads_the_part_of_the_map_that_it_needs() {
    let blocks = 40_000;
    let spec = Spec::new(blocks * BLOCK, 1, 0).with((0..blocks).step_by(400).map(|block| (block, State::Data(7))));
    let bytes = build(&spec);
    let mut io = MemoryDevices::new([(0, bytes.clone())]);
    let source = Vdi::open_source(&mut io, &device(0, &bytes, u64::MAX)).unwrap();
    let mut below = Ancestors::new(vec![Box::new(source)]);
    let before = (io.executed(), io.bytes_read);
    for block in (0..blocks).step_by(400) {
        let mut buffer = [0xff; 768];
        below.read(&mut io, (block * BLOCK + 512) as u64, &mut buffer).unwrap();
        assert_eq!(buffer[..512], fill(block, 7)[512..]);
        assert_eq!(buffer[512..], [0; 256]);
    }
    let (requests, bytes) = (io.executed() - before.0, io.bytes_read - before.1);
    assert!(requests <= 100 * 3 && bytes <= 100 * (2 * 512 + 512), "{requests} requests, {bytes} bytes");
}

#[test]
fn an_image_that_the_host_has_not_seen() {
    let bytes = build(&spec());
    let open = |config: &DeviceConfig| {
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        Vdi::open_source(&mut io, config).map(|_| ()).unwrap_err().code
    };
    let good = device(0, &bytes, u64::MAX);
    assert_eq!(open(&DeviceConfig { virtual_size: 512, ..good }), ErrorCode::HeaderMismatch);
    assert_eq!(open(&DeviceConfig { cluster_size: 512, ..good }), ErrorCode::HeaderMismatch);
    assert_eq!(open(&DeviceConfig { file_length: 600, ..good }), ErrorCode::OverlayCorrupt);
}
