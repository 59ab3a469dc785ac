//! What a check finds, and that the work follows from what the files hold.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{CheckSummary, DeviceConfig, ErrorCode, FindingKind};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{Extent, Extents, FormatDriver, ReadBelow, Sink, Source};
use instar_guest_view::Ancestors;
use instar_parallels_driver::Parallels;
use instar_parallels_testkit::{build, device, fill, le32, put32, section, Spec, CLUSTER, OPEN};

fn checked(bytes: &[u8]) -> (CheckSummary, Vec<(FindingKind, String)>) {
    let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
    let mut source = Parallels::open_source(&mut io, &device(0, bytes, u64::MAX)).unwrap();
    let mut findings = Vec::new();
    let summary = source.check(&mut io, &mut |kind, text| findings.push((kind, text.to_owned()))).unwrap();
    assert!(io.log.is_empty());
    (summary, findings)
}

fn spec() -> Spec {
    Spec::new(50 * CLUSTER).with([(0, 1), (1, 2), (7, 3)])
}

const BITMAP: u64 = 0x2038_5fae_252c_b34a;

/// The data of a dirty bitmap with these clusters.
fn bitmap(clusters: &[u64]) -> Vec<u8> {
    let mut data = vec![0; 28];
    data.extend((clusters.len() as u32).to_le_bytes());
    data.extend(clusters.iter().flat_map(|cluster| cluster.to_le_bytes()));
    data
}

#[test]
fn a_good_image_is_counted() {
    let bytes = build(&spec());
    let (summary, findings) = checked(&bytes);
    assert_eq!(findings, []);
    assert_eq!((summary.total_clusters, summary.allocated_clusters, summary.fragmented_clusters), (50, 3, 0));
    assert_eq!((summary.image_end_offset, summary.unused_tail), (bytes.len() as u64, 0));
    assert_eq!(checked(&build(&spec().with([(3, 4), (2, 5)]))).0.fragmented_clusters, 2);
    assert_eq!(checked(&[bytes, vec![0; 2 * CLUSTER + 5]].concat()).0.unused_tail, 2 * CLUSTER as u64);
    // Gaps are free, and not lost.
    let (summary, findings) = checked(&build(&Spec { gaps: vec![0, 2], ..spec().newer() }));
    assert_eq!((summary.allocated_clusters, summary.leaks, findings.len()), (3, 0, 0));
    // A bitmap of which all bits are 1, and one that has a cluster of its own, behind everything.
    let place = build(&spec()).len() as u64 / 512 + 2;
    let sections = Some(vec![section(BITMAP, 0, &bitmap(&[1, 0])), section(BITMAP, 0, &bitmap(&[place]))]);
    let bytes = build(&Spec { sections, tail: CLUSTER, ..spec() });
    let (summary, findings) = checked(&bytes);
    assert_eq!((findings.len(), summary.unused_tail, summary.image_end_offset), (0, 0, bytes.len() as u64));
}

#[test]
fn each_kind_of_damage_has_its_words() {
    type Case = (&'static str, fn(&mut Vec<u8>));
    let cases: [Case; 6] = [
        ("cluster 20 of the disk: entry 1001 names the cluster at offset 512512, which goes past the end", |bytes| {
            put32(bytes, 64 + 80, 1001);
        }),
        ("cluster 20 of the disk: entry 4 names offset 2048, which is not the start of a cluster", |bytes| {
            put32(bytes, 64 + 80, 4);
        }),
        ("cluster 20 of the disk lies in the same place as another one", |bytes| bytes.copy_within(68..72, 144)),
        ("the image was not closed", |bytes| put32(bytes, 44, OPEN)),
        ("flags say that the image is empty, and the BAT names 3 clusters", |bytes| put32(bytes, 52, 1)),
        ("ext_off is sector 4, where no cluster lies", |bytes| put32(bytes, 56, 4)),
    ];
    for (text, damage) in cases {
        let mut bytes = build(&spec());
        damage(&mut bytes);
        let (summary, findings) = checked(&bytes);
        let found: Vec<&String> = findings.iter().map(|(_, text)| text).collect();
        assert_eq!((summary.corruptions, found.len()), (1, 1), "{text}: {found:?}");
        assert!(found[0].contains(text), "{text}: {found:?}");
    }
    // Entries past the end of the disk.
    let (summary, findings) = checked(&build(&Spec { entries: 60, ..spec() }.with([(55, 9)])));
    assert_eq!((summary.corruptions, summary.leaks, summary.allocated_clusters), (0, 1, 3), "{findings:?}");
}

#[test]
fn an_extension_is_looked_at() {
    let odd = |sections: Vec<Vec<u8>>, damage: &dyn Fn(&mut Vec<u8>), text: &str| {
        let mut bytes = build(&Spec { sections: Some(sections), ..spec() });
        damage(&mut bytes);
        let (summary, findings) = checked(&bytes);
        assert!(summary.corruptions == 1 && findings[0].1.contains(text), "{text}: {findings:?}");
    };
    let nothing = |_: &mut Vec<u8>| {};
    odd(vec![section(BITMAP, 0, &bitmap(&[7000]))], &nothing, "a cluster at offset 3584000, where none lies");
    odd(vec![section(BITMAP, 0, &bitmap(&[2, 3]))], &nothing, "a cluster at offset 1024, where none lies");
    let last = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    odd(vec![section(5, 0, b"x")], &last, "checksum");
    let first = u64::from(le32(&build(&spec()), 68));
    odd(vec![section(BITMAP, 0, &bitmap(&[first]))], &nothing, "1 clusters of the disk lie where the format extension");
    odd(
        vec![section(BITMAP, 0, &bitmap(&[first, first]))],
        &nothing,
        "two parts of the format extension lie at offset",
    );
}

/// A BAT that is long and lies in a hole costs nothing; nor does one that names one cluster over and over.
#[test]
fn a_bat_in_a_hole_is_not_gone_through() {
    let entries = 4_000_000;
    let size = entries * CLUSTER as u64;
    let mut bytes = build(&Spec { entries: entries as usize, ..Spec::new(50 * CLUSTER) });
    put32(&mut bytes, 36, (size / 512) as u32);
    let work = |bytes: &[u8]| {
        let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
        io.holes = true;
        let mut source = Parallels::open_source(&mut io, &device(0, bytes, u64::MAX)).unwrap();
        let held = source.verify(&mut io, true);
        let mut out = Extents::with_room_for(10);
        let next = source.extents(&mut io, 0..size, &mut out);
        (held.map_err(|error| error.code), next.map_err(|error| error.code), io.bytes_read, io.executed())
    };
    let (held, next, read, requests) = work(&bytes);
    assert_eq!((held, next), (Ok(0), Ok(size)));
    assert!(read <= 64 + 2 * (64 << 10) && requests < 20, "{read} bytes in {requests} requests");
    // Nor do zeroes that arrive for all of it.
    let mut io = MemoryDevices::new([(0, bytes.clone())]);
    io.holes = true;
    let mut sink = Parallels::open_sink(&mut io, &device(0, &bytes, u64::MAX), false).unwrap();
    sink.plan(&mut io, &[Extent::zero(0, size)]).unwrap();
    assert_eq!(sink.planned(&mut io).unwrap().new_data_clusters, 0);
    assert!(io.bytes_read < 1 << 20 && io.executed() < 40, "{} bytes in {} requests", io.bytes_read, io.executed());
    let first = bytes.len() as u32 / 512;
    bytes.resize(bytes.len() + CLUSTER, 7);
    for entry in 0..100_000 {
        put32(&mut bytes, 64 + entry * 4, first);
    }
    let (held, next, read, _) = work(&bytes);
    assert_eq!((held, next), (Err(ErrorCode::OverlayCorrupt), Err(ErrorCode::OverlayCorrupt)));
    assert!(read < 1 << 20, "{read} bytes");
    let (summary, findings) = checked(&bytes);
    assert_eq!((summary.corruptions, findings.len()), (100, 101));
}

#[test]
fn a_long_file_takes_no_more_than_its_bat() {
    let bytes = build(&spec().newer());
    let work = |bytes: &[u8], length: u64| {
        let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
        let config = DeviceConfig { file_length: length, ..device(0, bytes, u64::MAX) };
        let held = Parallels::open_source(&mut io, &config).unwrap().verify(&mut io, true);
        (held.map_err(|error| error.text), io.executed(), io.bytes_read)
    };
    assert_eq!(work(&bytes, bytes.len() as u64), work(&bytes, 1 << 60));
    // Two clusters in one place, far behind.
    let mut far = bytes;
    for entry in [20, 30] {
        put32(&mut far, 64 + entry * 4, 0xf000_0000);
    }
    assert!(work(&far, 1 << 60).0.unwrap_err().contains("the same place"));
}

/// A gap far in front of the end is found without a bitmap of all places.
#[test]
fn gaps_of_a_long_file_are_filled() {
    let mut bytes = build(&Spec { size: 60 * CLUSTER, entries: 60, ..spec() }.newer());
    put32(&mut bytes, 64 + 40 * 4, 0xf000_0000);
    let config = DeviceConfig { file_length: 1 << 50, ..device(0, &bytes, u64::MAX) };
    let mut io = MemoryDevices::new([(0, bytes.clone()), (1, vec![9; 2 * CLUSTER])]);
    let mut sink = Parallels::open_sink(&mut io, &config, false).unwrap();
    let extents = [Extent::data(10 * CLUSTER as u64, 2 * CLUSTER as u64, 1, 0)];
    sink.plan(&mut io, &extents).unwrap();
    let plan = sink.planned(&mut io).unwrap();
    assert_eq!((plan.final_length, plan.new_data_clusters), (1 << 50, 2));
    assert!(io.bytes_read < 4096 && io.executed() < 10, "{} bytes in {} requests", io.bytes_read, io.executed());
}

#[test]
fn filling_a_gap_reads_the_part_of_the_bat_that_it_needs() {
    let clusters = 40_000;
    let held = (0..clusters).step_by(400);
    let bytes = build(&Spec::new(clusters * CLUSTER).with(held.clone().map(|cluster| (cluster, 7))));
    let mut io = MemoryDevices::new([(0, bytes.clone())]);
    let source = Parallels::open_source(&mut io, &device(0, &bytes, u64::MAX)).unwrap();
    let mut below = Ancestors::new(vec![Box::new(source)]);
    let before = (io.executed(), io.bytes_read);
    for cluster in held {
        let mut buffer = [0xff; 768];
        below.read(&mut io, (cluster * CLUSTER + 512) as u64, &mut buffer).unwrap();
        assert_eq!(buffer[..512], fill(cluster, 7, CLUSTER)[512..]);
        assert_eq!(buffer[512..], [0; 256]);
    }
    let (requests, read) = (io.executed() - before.0, io.bytes_read - before.1);
    assert!(requests <= 100 * 3 && read <= 100 * (2 * 512 + 768), "{requests} requests, {read} bytes");
}

/// The size of a disk, its BAT, and the list of clusters that move all have ends.
#[test]
fn a_disk_that_would_be_too_large() {
    let grow = |spec: &Spec, size: u64| {
        let bytes = build(spec);
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        let mut sink = Parallels::open_sink(&mut io, &device(0, &bytes, u64::MAX), false).unwrap();
        sink.grow(&mut io, size, 0).map_err(|error| error.text)
    };
    let large = Spec::new(50 * CLUSTER).of_tracks(2048);
    for (spec, size, why) in [
        (large.clone(), (1 << 41) + 512, "4 bytes count its sectors"),
        (large.clone().newer(), 1 << 61, "the BAT cannot map"),
        (spec(), CLUSTER as u64 * (1 << 29), "the BAT cannot map"),
        (spec(), 51 * CLUSTER as u64 + 1, "no multiple of 512"),
    ] {
        assert!(grow(&spec, size).unwrap_err().contains(why), "{why}");
    }
    assert_eq!((grow(&large, (1 << 41) - 512), grow(&large.newer(), (1 << 41) + 512)), (Ok(()), Ok(())));
    let many = Spec::new(70_000 * 512).of_tracks(1).with((0..66_000).map(|cluster| (cluster, 1)));
    assert!(grow(&many, 1 << 33).unwrap_err().contains("grow in smaller steps"));
}

#[test]
fn an_image_that_the_host_has_not_seen() {
    let bytes = build(&spec().newer());
    let open = |config: &DeviceConfig| {
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        Parallels::open_source(&mut io, config).map(|_| ()).unwrap_err().code
    };
    let good = device(0, &bytes, u64::MAX);
    assert_eq!(open(&DeviceConfig { virtual_size: 512, ..good }), ErrorCode::HeaderMismatch);
    assert_eq!(open(&DeviceConfig { cluster_size: 512, ..good }), ErrorCode::HeaderMismatch);
    assert_eq!(open(&DeviceConfig { file_length: 100, ..good }), ErrorCode::OverlayCorrupt);
    assert_eq!(open(&DeviceConfig { file_length: 500, ..good }), ErrorCode::OverlayCorrupt);
}
