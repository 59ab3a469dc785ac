//! The work follows from what the files hold, and not from the size of the disk: requests and bytes are counted.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::{DeviceRole, ErrorCode, Phase, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, Extent, FormatDriver, ReadBelow, Sink, Source};
use instar_guest_view::Ancestors;
use instar_qcow2_driver::image::{Image, Role};
use instar_qcow2_driver::refcount::blocks::Refcounts;
use instar_qcow2_driver::refcount::in_use::InUse;
use instar_qcow2_driver::Qcow2;
use instar_qcow2_format::HostCluster;
use instar_qcow2_testkit::builder::{build, pattern, Spec, State};
use instar_qcow2_testkit::damage::put64;
use instar_qcow2_testkit::{be32, be64, config, run_commit, ANCESTOR, OVERLAY};

const SIZE: u64 = 512;
/// Guest bytes that an L2 table maps.
const COVERAGE: u64 = SIZE / 8 * SIZE;

/// An image of `tables` L1 entries that all name the L2 table of the first: 0.3 MiB can be a disk of terabytes.
fn one_table_many_times(tables: u64) -> Vec<u8> {
    let mut spec = Spec::new(9, tables * COVERAGE).with([(5, State::Data(3))]);
    spec.table_clusters = 8;
    let mut bytes = build(&spec);
    let (l1, entries) = (be64(&bytes, 40), u64::from(be32(&bytes, 36)));
    let first = be64(&bytes, l1 as usize);
    (0..entries).for_each(|index| put64(&mut bytes, l1 + index * 8, first));
    bytes
}

#[test]
fn filling_a_gap_reads_the_tables_of_the_gap() {
    let mut io = MemoryDevices::new([(ANCESTOR, one_table_many_times(4096))]);
    let device = config(&io, ANCESTOR);
    let source = Qcow2::open_source(&mut io, &device).unwrap();
    let mut below = Ancestors::new(vec![Box::new(source)]);
    let (requests, bytes) = (io.executed(), io.bytes_read);
    // The second half of the cluster, and the one after it, in every fourth of the first 400 tables.
    for table in (0..400).step_by(4) {
        let mut buffer = [0xff; 768];
        below.read(&mut io, table * COVERAGE + 5 * SIZE + 256, &mut buffer).unwrap();
        assert_eq!(buffer[..256], pattern(3, 5, 512)[256..]);
        assert_eq!(buffer[256..], [0; 512]);
        // Again, and what is before it: the table is there already.
        below.read(&mut io, table * COVERAGE + 4 * SIZE, &mut buffer[..512]).unwrap();
        assert_eq!(buffer[..512], [0; 512]);
    }
    let (requests, bytes) = (io.executed() - requests, io.bytes_read - bytes);
    // For each gap a table and the data; the L1 table once.
    assert!(requests <= 100 * 2 + 4096 * 8 / 512, "{requests} requests");
    assert!(bytes <= 100 * (SIZE + 256) + 4096 * 8, "{bytes} bytes");
}

/// What checking an image as an overlay that will be emptied asks for: requests, and bytes read.
fn check_work(bytes: Vec<u8>) -> (usize, u64) {
    let mut io = MemoryDevices::new([(OVERLAY, bytes)]);
    io.holes = true;
    let device = config(&io, OVERLAY);
    let mut source = Qcow2::open_source(&mut io, &device).unwrap();
    source.verify(&mut io, true).unwrap();
    (io.executed(), io.bytes_read)
}

/// Append `count` clusters to an image with room in its refcount table, each with refcount 1.
fn append(bytes: &mut Vec<u8>, count: u64) -> u64 {
    let size = 1u64 << be32(bytes, 20);
    let first = bytes.len() as u64 / size;
    bytes.resize(bytes.len() + (count * size) as usize, 0);
    let block = be64(bytes, be64(bytes, 48) as usize);
    for cluster in first..first + count {
        let at = (block + cluster * 2) as usize;
        assert!(at < (block + size) as usize, "one refcount block is enough");
        bytes[at + 1] = 1;
    }
    first * size
}

#[test]
fn l1_tables_of_snapshots_in_holes_are_not_read() {
    let work = |entries: u64| {
        let spec = Spec { snapshots: 8, ..Spec::new(16, 64 << 20) }.with([(5, State::Data(3))]);
        let mut bytes = build(&spec);
        for number in 0..8u64 {
            let table = append(&mut bytes, (entries * 8).div_ceil(1 << 16));
            // Entries have different lengths: names of 3 bytes more each time.
            let entry: u64 = (0..number).map(|n| (40 + 16 + 1 + n * 3).next_multiple_of(8)).sum();
            let at = be64(&bytes, 64) + entry;
            let old = (be64(&bytes, at as usize), be32(&bytes, at as usize + 8));
            let moved = bytes[old.0 as usize..][..old.1 as usize * 8].to_vec();
            bytes[table as usize..][..moved.len()].copy_from_slice(&moved);
            put64(&mut bytes, at, table);
            bytes[at as usize + 8..][..4].copy_from_slice(&(entries as u32).to_be_bytes());
        }
        check_work(bytes)
    };
    let (short, long) = (work(1), work(1 << 18));
    assert!(long.1 < short.1 + ((8 * 4) << 20) / 16, "{short:?} became {long:?}");
    assert!(long.0 <= short.0 + 8 * 8, "{short:?} became {long:?}");
}

#[test]
fn l2_tables_in_holes_are_not_read() {
    let work = |tables: u64| {
        // Clusters of 64 KiB: an L2 table maps 512 MiB.
        let mut bytes = build(&Spec::new(16, 1 << 40).with([(5, State::Data(3))]));
        let first = append(&mut bytes, tables);
        let l1 = be64(&bytes, 40);
        (0..tables).for_each(|index| put64(&mut bytes, l1 + (index + 1) * 8, (first + index * 65536) | (1 << 63)));
        check_work(bytes)
    };
    // Those of the first window are read: only then is it known that there are such tables.
    let (few, many) = (work(40), work(1500));
    assert_eq!(many.1.saturating_sub(few.1), 0, "{few:?} became {many:?}");
    assert!(many.0 < few.0 + 8, "{few:?} became {many:?}");
}

#[test]
fn snapshots_that_share_tables_are_walked_once() {
    let work = |snapshots: usize| {
        let mut spec = Spec::new(12, 64 << 20);
        (spec.snapshots, spec.table_clusters) = (snapshots, 2);
        // 30 tables of 4 KiB.
        check_work(build(&spec.with((0..30).map(|table| (table * 512, State::Data(7))))))
    };
    let (one, forty) = (work(1), work(40));
    assert!(forty.1 < one.1 + 40 * 2 * 4096, "{one:?} became {forty:?}");
}

#[test]
fn a_snapshot_that_names_a_table_twice_is_refused() {
    let spec = Spec { snapshots: 1, ..Spec::new(9, 8 * COVERAGE) }.with([(5, State::Data(3))]);
    let mut backing = build(&spec);
    let table = be64(&backing, be64(&backing, 64) as usize);
    let first = be64(&backing, table as usize);
    put64(&mut backing, table + 8, first);
    let overlay = build(&Spec::new(9, 8 * COVERAGE).with([(5, State::Data(4))]));
    let mut io = MemoryDevices::new([(OVERLAY, overlay), (DEVICE_OUTPUT, backing)]);
    let failure = run_commit(&mut io, Options::default()).unwrap_err();
    assert_eq!(failure.error.code, ErrorCode::BackingCorrupt);
    assert!(io.log.is_empty());
}

/// Refcount blocks in a hole describe a hundred million clusters past the end of the file.
#[test]
fn refcounts_in_holes_are_not_counted_one_by_one() {
    let bits = 16;
    let mut backing = build(&Spec::new(bits, 64 << 20).with([(5, State::Data(3))]));
    let table = be64(&backing, 48);
    let blocks = 3000;
    let first = append(&mut backing, blocks);
    (0..blocks).for_each(|index| put64(&mut backing, table + (index + 1) * 8, first + (index << bits)));
    // Two of them are in use.
    for index in [7, 2999] {
        backing[(first + (index << bits)) as usize + 9] = 1;
    }
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, backing)]);
    io.holes = true;
    let device = config(&io, DEVICE_OUTPUT);
    let image = Image::open(&mut io, &device, Role::Sink).unwrap();
    let found = Refcounts::new(&image).in_use(&mut io, &image, 32768..u64::MAX).unwrap();
    assert_eq!(found, InUse { count: 2, last: Some(HostCluster(3000 * 32768 + 4)) });
    assert!(io.executed() < 200 && io.bytes_read < 1 << 20, "{} requests, {} bytes", io.executed(), io.bytes_read);
}

/// A short layer below a large overlay stands for zeroes up to the end of the disk.
#[test]
fn zeroes_over_what_nothing_maps_cost_nothing() {
    const CLUSTER: u64 = 1 << 16;
    const MAPPED: [u64; 3] = [5, 8192 * 77 + 1, 8192 * 131_071 + 8191];
    let spec = Spec::new(16, 8192 * CLUSTER * (1 << 17)).with(MAPPED.map(|cluster| (cluster, State::Data(3))));
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, build(&spec))]);
    let device = config(&io, DEVICE_OUTPUT);
    io.hold([(DeviceRole::Target, &device)]);
    let guest_offset = 3 * CLUSTER + 512;
    let length = device.virtual_size - guest_offset;
    let zeroes = [Extent::zero(guest_offset, length)];
    let mut sink = Qcow2::open_sink(&mut io, &device, false).unwrap();
    sink.plan(&mut io, &zeroes).unwrap();
    let summary = sink.planned(&mut io).unwrap();
    assert_eq!((summary.new_data_clusters, summary.new_metadata_clusters), (0, 0));
    io.enter(Phase::Target);
    sink.write(&mut io, &zeroes, &mut Ancestors::new(vec![])).unwrap();
    sink.finish(&mut io).unwrap();
    assert!(io.executed() < 1000 && io.bytes_read < 8 << 20, "{} requests, {} bytes", io.executed(), io.bytes_read);
    let source = Qcow2::open_source(&mut io, &device).unwrap();
    let mut image = Ancestors::new(vec![Box::new(source)]);
    for cluster in MAPPED {
        let mut buffer = [0xff; CLUSTER as usize];
        image.read(&mut io, cluster * CLUSTER, &mut buffer).unwrap();
        assert!(buffer.iter().all(|&byte| byte == 0), "cluster {cluster}");
    }
}

#[test]
fn refcounts_are_counted_as_one_by_one() {
    for order in 0..7 {
        let spec = Spec { refcount_order: order, leaks: 9, free: 70, table_clusters: 4, ..Spec::new(9, 1 << 20) };
        let bytes = build(&spec.with((0..40).map(|c| (c * 3, State::Data(1)))));
        let end = bytes.len() as u64 / 512;
        for holes in [false, true] {
            let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.clone())]);
            io.holes = holes;
            let device = config(&io, DEVICE_OUTPUT);
            let image = Image::open(&mut io, &device, Role::Sink).unwrap();
            let mut refcounts = Refcounts::new(&image);
            for (first, last) in [(0, end), (0, 1), (3, 4), (5, 200), (63, 65), (end - 1, end + 5000), (7, 7), (9, 3)] {
                let mut expected = InUse::default();
                refcounts.load(&mut io, &image, (first..last.min(end)).map(HostCluster)).unwrap();
                for cluster in first..last.min(end) {
                    if refcounts.get(&image, HostCluster(cluster)).unwrap() != 0 {
                        expected = InUse { count: expected.count + 1, last: Some(HostCluster(cluster)) };
                    }
                }
                let mut fresh = Refcounts::new(&image);
                let found = fresh.in_use(&mut io, &image, first..last).unwrap();
                assert_eq!(found, expected, "order {order}, {first}..{last}");
                // What was changed and not written counts.
                if first == 3 && expected.count == 1 {
                    fresh.load(&mut io, &image, [HostCluster(3)].into_iter()).unwrap();
                    fresh.set(&image, HostCluster(3), 0).unwrap();
                    assert_eq!(fresh.in_use(&mut io, &image, 3..4).unwrap(), InUse::default());
                }
            }
        }
    }
}
