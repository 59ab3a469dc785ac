//! What a check finds, and that the work follows from what the files hold.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{CheckSummary, DeviceConfig, ErrorCode, FindingKind};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{Extents, FormatDriver, ReadBelow, Source};
use instar_guest_view::Ancestors;
use instar_qcow_driver::Qcow;
use instar_qcow_testkit::{build, device, fill, put64, Spec, State, View, CLUSTER};

fn checked(bytes: &[u8]) -> (CheckSummary, Vec<(FindingKind, String)>) {
    let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
    let mut source = Qcow::open_source(&mut io, &device(0, bytes, u64::MAX)).unwrap();
    let mut findings = Vec::new();
    let summary = source.check(&mut io, &mut |kind, text| findings.push((kind, text.to_owned()))).unwrap();
    assert!(io.log.is_empty());
    (summary, findings)
}

fn spec() -> Spec {
    Spec::new(150 * CLUSTER, b"base").with([(0, State::Data(1)), (1, State::Data(2)), (7, State::Packed(3))])
}

#[test]
fn a_good_image_is_counted() {
    let bytes = build(&spec());
    let (summary, findings) = checked(&bytes);
    assert_eq!(findings, []);
    assert_eq!((summary.total_clusters, summary.allocated_clusters, summary.compressed_clusters), (150, 3, 1));
    assert_eq!((summary.fragmented_clusters, summary.image_end_offset), (0, bytes.len() as u64));
    assert_eq!(checked(&build(&spec().with([(140, State::Data(1)), (5, State::Data(1))]))).0.fragmented_clusters, 3);
    assert_eq!(checked(&[bytes, vec![0; 2 * CLUSTER + 5]].concat()).0.unused_tail, 2 * CLUSTER as u64);
}

#[test]
fn damage_is_counted_and_what_lies_past_the_end() {
    let mut bytes = build(&spec());
    let table = View::new(&bytes).tables[0].start;
    put64(&mut bytes, table + 80, 1 << 40);
    put64(&mut bytes, table + 88, table as u64);
    let (summary, findings) = checked(&bytes);
    assert_eq!((summary.corruptions, findings.len()), (2, 2), "{findings:?}");
    let cut = Spec { size: 5 * CLUSTER, ..spec() };
    let (summary, findings) = checked(&build(&cut));
    assert_eq!((summary.corruptions, summary.leaks, summary.allocated_clusters), (0, 1, 2), "{findings:?}");
    assert!(findings[0].1.contains("1 L2 entries are for clusters past the end"));
}

/// Entries of L1 tables that are long, and lie in holes, cost nothing; nor does one table that all of them name.
#[test]
fn a_table_in_a_hole_is_not_read() {
    let size = 1u64 << 40;
    let mut bytes = build(&spec());
    let l1 = bytes.len().next_multiple_of(4096);
    bytes.resize(l1 + (size / (64 * CLUSTER as u64) * 8) as usize, 0);
    put64(&mut bytes, 24, size);
    put64(&mut bytes, 40, l1 as u64);
    let work = |bytes: &[u8]| {
        let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
        io.holes = true;
        let mut source = Qcow::open_source(&mut io, &device(0, bytes, u64::MAX)).unwrap();
        let held = source.verify(&mut io, true);
        let mut out = Extents::with_room_for(10);
        let next = source.extents(&mut io, 0..size, &mut out);
        (held.map_err(|error| error.code), next.map_err(|error| error.code), io.bytes_read, io.executed())
    };
    let (held, next, read, requests) = work(&bytes);
    assert_eq!((held, next), (Ok(0), Ok(size)));
    assert!(read < 4096 && requests < 20, "{read} bytes in {requests} requests");
    let table = View::new(&build(&spec())).tables[0].start;
    for entry in 0..100_000 {
        put64(&mut bytes, l1 + entry * 8, table as u64);
    }
    let (held, next, read, _) = work(&bytes);
    assert_eq!((held, next), (Err(ErrorCode::OverlayCorrupt), Err(ErrorCode::OverlayCorrupt)));
    assert!(read < 1 << 20, "{read} bytes");
    let (summary, findings) = checked(&bytes);
    assert_eq!((summary.corruptions, findings.len()), (100, 101));
}

#[test]
fn a_long_file_takes_no_more_than_its_tables() {
    let bytes = build(&spec());
    let work = |bytes: &[u8], length: u64| {
        let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
        let config = DeviceConfig { file_length: length, ..device(0, bytes, u64::MAX) };
        let held = Qcow::open_source(&mut io, &config).unwrap().verify(&mut io, true);
        (held.map_err(|error| error.text), io.executed(), io.bytes_read)
    };
    assert_eq!(work(&bytes, bytes.len() as u64), work(&bytes, 1 << 60));
    // Two clusters in one place, far behind.
    let mut far = bytes;
    let table = View::new(&far).tables[0].start;
    for entry in [20, 30] {
        put64(&mut far, table + entry * 8, 1 << 45);
    }
    assert!(work(&far, 1 << 60).0.unwrap_err().contains("something else uses"));
    put64(&mut far, table + 30 * 8, 1 << 46);
    assert!(work(&far, 1 << 60).0.unwrap_err().contains("further than 64 TiB"));
}

#[test]
fn filling_a_gap_reads_the_part_of_the_tables_that_it_needs() {
    let clusters = 20_000;
    let spec = Spec { l2_bits: 13, ..Spec::new(clusters * CLUSTER, b"") };
    let bytes = build(&spec.with((0..clusters).step_by(400).map(|cluster| (cluster, State::Data(7)))));
    let mut io = MemoryDevices::new([(0, bytes.clone())]);
    let source = Qcow::open_source(&mut io, &device(0, &bytes, u64::MAX)).unwrap();
    let mut below = Ancestors::new(vec![Box::new(source)]);
    let before = (io.executed(), io.bytes_read);
    for cluster in (0..clusters).step_by(400) {
        let mut buffer = [0xff; 768];
        below.read(&mut io, (cluster * CLUSTER + 512) as u64, &mut buffer).unwrap();
        assert_eq!(buffer[..512], fill(cluster, 7, CLUSTER)[512..]);
        assert_eq!(buffer[512..], [0; 256]);
    }
    let (requests, read) = (io.executed() - before.0, io.bytes_read - before.1);
    assert!(requests <= 50 * 4 && read <= 50 * (2 * 512 + 768), "{requests} requests, {read} bytes");
}

#[test]
fn an_image_that_the_host_has_not_seen() {
    let bytes = build(&spec());
    let open = |config: &DeviceConfig| {
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        Qcow::open_source(&mut io, config).map(|_| ()).unwrap_err().code
    };
    let good = device(0, &bytes, u64::MAX);
    assert_eq!(open(&DeviceConfig { virtual_size: 512, ..good }), ErrorCode::HeaderMismatch);
    assert_eq!(open(&DeviceConfig { cluster_size: 512, ..good }), ErrorCode::HeaderMismatch);
    assert_eq!(open(&DeviceConfig { file_length: 60, ..good }), ErrorCode::OverlayCorrupt);
}
