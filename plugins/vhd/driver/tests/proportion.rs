//! The work follows from what the files hold: requests and bytes are counted.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{Extents, FormatDriver, ReadBelow, Source};
use instar_guest_view::Ancestors;
use instar_vhd_driver::Vhd;
use instar_vhd_testkit::{build, device, fill, put32, put64, seal, Kind, Spec};

fn io(bytes: &[u8]) -> (MemoryDevices, DeviceConfig) {
    (MemoryDevices::new([(0, bytes.to_vec())]), device(0, bytes, u64::MAX))
}

#[test]
fn what_is_not_there_takes_its_entries_and_no_more() {
    let work = |blocks: usize| {
        let spec = Spec::new(Kind::Differencing, blocks << 14, 1 << 14).with([(3, 2, 5)]);
        let (mut io, device) = io(&build(&spec));
        let mut source = Vhd::open_source(&mut io, &device).unwrap();
        assert_eq!(source.verify(&mut io, true).unwrap(), 1);
        let mut extents = Extents::with_room_for(9);
        let end = source.extents(&mut io, 0..device.virtual_size, &mut extents).unwrap();
        assert_eq!((end, extents.len(), extents[0].guest_offset), (device.virtual_size, 1, 3 * 512));
        (io.executed(), io.bytes_read)
    };
    let (few, many) = (work(1000), work(100_000));
    // The table is read twice, once to verify it.
    assert!(many.1 <= few.1 + 100_000 * 8, "{few:?} became {many:?}");
    assert!(many.0 <= few.0 + 60, "{few:?} became {many:?}");
}

#[test]
fn filling_a_gap_reads_what_is_said_of_it_once() {
    let runs = (0..4000).step_by(40).map(|block| (block * 32 + 5, 1, 7));
    let bytes = build(&Spec::new(Kind::Differencing, 4000 << 14, 1 << 14).with(runs));
    let (mut io, device) = io(&bytes);
    let source = Vhd::open_source(&mut io, &device).unwrap();
    let mut below = Ancestors::new(vec![Box::new(source)]);
    let before = (io.executed(), io.bytes_read);
    for block in (0..4000).step_by(40) {
        let mut buffer = [0xff; 768];
        below.read(&mut io, (block * 32 + 5) * 512 + 256, &mut buffer).unwrap();
        assert_eq!(buffer[..256], fill(block as usize * 32 + 5, 7)[256..]);
        assert_eq!(buffer[256..], [0; 512]);
        below.read(&mut io, (block * 32 + 9) * 512, &mut buffer).unwrap();
        assert_eq!(buffer, [0; 768]);
    }
    let (requests, bytes) = (io.executed() - before.0, io.bytes_read - before.1);
    assert!(requests <= 100 * 3 + 40, "{requests} requests");
    // A sector of bitmap for each, a sector of table for each 128 blocks, and the data.
    assert!(bytes <= 100 * (512 + 512) + 40 * 512, "{bytes} bytes");
}

/// A table in a hole has entries of zero, which name the footer in front: the first is refused.
#[test]
fn a_table_of_four_billion_entries_in_a_hole_is_refused_at_once() {
    let mut bytes = build(&Spec::new(Kind::Differencing, 1 << 20, 1 << 14));
    bytes.truncate(bytes.len() - 512);
    put64(&mut bytes, 48, 2000 << 30);
    seal(&mut bytes, 0, 512, 64);
    put64(&mut bytes, 512 + 16, 1 << 20);
    put32(&mut bytes, 512 + 28, u32::MAX as usize);
    put32(&mut bytes, 512 + 32, 512);
    seal(&mut bytes, 512, 1024, 36);
    let mut io = MemoryDevices::new([(0, bytes)]);
    let device = DeviceConfig {
        file_length: 20 << 30,
        max_length: u64::MAX,
        virtual_size: 2000 << 30,
        cluster_size: 512,
        ..DeviceConfig::default()
    };
    let mut source = Vhd::open_source(&mut io, &device).unwrap();
    let error = source.verify(&mut io, true).unwrap_err();
    assert!(error.code == ErrorCode::OverlayCorrupt && error.text.contains("overlaps"), "{error}");
    assert!(io.executed() < 10 && io.bytes_read < 1 << 20, "{} requests, {} bytes", io.executed(), io.bytes_read);
}
