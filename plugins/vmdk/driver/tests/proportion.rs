//! The work follows from what the files hold: requests and bytes are counted.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::DeviceConfig;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{Extents, FormatDriver, ReadBelow, Source};
use instar_guest_view::Ancestors;
use instar_vmdk_driver::Vmdk;
use instar_vmdk_testkit::{build, device, fill, put32, Spec, State, GRAIN};

/// Guest bytes that a grain table maps.
const COVERAGE: usize = 512 * GRAIN;

fn io(bytes: &[u8]) -> (MemoryDevices, DeviceConfig) {
    let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
    io.holes = true;
    (io, device(0, bytes, u64::MAX))
}

#[test]
fn tables_in_holes_are_not_read() {
    let work = |tables: usize| {
        let spec = Spec::new(tables * COVERAGE, 1, u32::MAX).with([(3, State::Data(5))]);
        let (mut io, device) = io(&build(&spec));
        let mut source = Vmdk::open_source(&mut io, &device).unwrap();
        assert_eq!(source.verify(&mut io, true).unwrap(), 1);
        let mut extents = Extents::with_room_for(9);
        let end = source.extents(&mut io, 0..device.virtual_size, &mut extents).unwrap();
        assert_eq!((end, extents.len(), extents[0].guest_offset), (device.virtual_size, 1, 3 * GRAIN as u64));
        (io.executed(), io.bytes_read)
    };
    let (few, many) = (work(300), work(12_000));
    // The two directories are longer, by four bytes for each table; each is read once.
    assert!(many.1 <= few.1 + 12_000 * 8, "{few:?} became {many:?}");
    assert!(many.0 <= few.0 + 5 * (12_000 / 256), "{few:?} became {many:?}");
}

#[test]
fn filling_a_gap_reads_the_table_of_the_gap_once() {
    let grains = (0..400).step_by(4).map(|table| (table * 512 + 5, State::Data(7)));
    let bytes = build(&Spec::new(400 * COVERAGE, 1, u32::MAX).with(grains));
    let (mut io, device) = io(&bytes);
    let source = Vmdk::open_source(&mut io, &device).unwrap();
    let mut below = Ancestors::new(vec![Box::new(source)]);
    let before = (io.executed(), io.bytes_read);
    for table in (0..400).step_by(4) {
        let mut buffer = [0xff; 768];
        below.read(&mut io, (table * COVERAGE + 5 * GRAIN + 512) as u64, &mut buffer).unwrap();
        assert_eq!(buffer[..512], fill(table * 512 + 5, 7)[512..]);
        assert_eq!(buffer[512..], [0; 256]);
        below.read(&mut io, (table * COVERAGE + 7 * GRAIN) as u64, &mut buffer).unwrap();
        assert_eq!(buffer, [0; 768]);
    }
    let (requests, bytes) = (io.executed() - before.0, io.bytes_read - before.1);
    assert!(requests <= 100 * 2, "{requests} requests");
    assert!(bytes <= 100 * (2048 + 512), "{bytes} bytes");
}

#[test]
fn a_long_hole_at_the_end_of_the_file_is_not_gone_through() {
    let mut bytes = build(&Spec::new(2 * COVERAGE, 1, u32::MAX).with([(3, State::Data(5))]));
    let (mut short, config) = io(&bytes);
    let mut source = Vmdk::open_source(&mut short, &config).unwrap();
    source.verify(&mut short, false).unwrap();
    // The file is said to be a terabyte long; what lies past its bytes reads as zeroes.
    let (mut long, config) = io(&bytes);
    let config = DeviceConfig { file_length: 1 << 40, ..config };
    let mut source = Vmdk::open_source(&mut long, &config).unwrap();
    source.verify(&mut long, false).unwrap();
    assert_eq!((long.executed(), long.bytes_read), (short.executed(), short.bytes_read));
    // A grain that lies far behind is found nevertheless, and one in the same place, too.
    let directory = instar_vmdk_testkit::le64(&bytes, 56) as usize * 512;
    let table = instar_vmdk_testkit::le32(&bytes, directory) * 512;
    put32(&mut bytes, table + 7 * 4, 1 << 30);
    put32(&mut bytes, table + 9 * 4, (1 << 30) + 1);
    let (mut far, _) = io(&bytes);
    let mut source = Vmdk::open_source(&mut far, &config).unwrap();
    assert!(source.verify(&mut far, false).unwrap_err().text.contains("overlaps"));
}
