//! Headers and format extensions, as the specification and QEMU's `parallels_open` have them: what is taken, what is not, and
//! what a new image says.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_parallels_format::{
    checksum, create, field, CreateOptions, Extension, FormatError, Header, InUse, Trouble, Variant, DIRTY_BITMAP,
    EXTENSION_HEAD, EXTENSION_MAGIC, HEADER_BYTES, MOST_ENTRIES, MOST_TRACKS,
};

const MIB: u64 = 1 << 20;

fn bytes(virtual_size: u64, cluster: u64) -> [u8; HEADER_BYTES] {
    create(&CreateOptions { virtual_size, cluster }).unwrap().start
}

fn with(changes: &[(usize, &[u8])]) -> Result<Header, FormatError> {
    let mut bytes = bytes(5 * MIB + 512, MIB);
    for (at, change) in changes {
        bytes[*at..at + change.len()].copy_from_slice(change);
    }
    Header::parse(&bytes)
}

const OLD: (usize, &[u8]) = (0, b"WithoutFreeSpace");

#[test]
fn new_images_have_qemus_shape() {
    let image = create(&CreateOptions { virtual_size: 5 * MIB + 1, cluster: MIB }).unwrap();
    let header = Header::parse(&image.start).unwrap();
    assert_eq!(
        (header.variant, header.virtual_size(), header.cluster_bytes()),
        (Variant::Clusters, 5 * MIB + 512, MIB)
    );
    assert_eq!((header.entries, header.disk_clusters(), header.bat_end()), (6, 6, 88));
    assert_eq!((header.data_start(), header.floor(), image.length, header.in_use), (MIB, MIB, MIB, InUse::ClosedByOld));
    for (size, cluster) in [(0, MIB), (u64::MAX, MIB), (MIB, 0), (MIB, 256), (MIB, 768), (MIB, 1 << 31)] {
        assert!(create(&CreateOptions { virtual_size: size, cluster }).is_err(), "{size} {cluster}");
    }
    let most = u64::from(MOST_ENTRIES) * 512;
    assert!(create(&CreateOptions { virtual_size: most, cluster: 512 }).is_ok());
    assert!(create(&CreateOptions { virtual_size: most + 1, cluster: 512 }).is_err());
}

#[test]
fn what_no_image_may_say() {
    let zero: &[u8] = &[0; 4];
    let tracks = (MOST_TRACKS + 1).to_le_bytes();
    type Case<'a> = (&'a [(usize, &'a [u8])], &'a str);
    let corrupt: [Case<'_>; 9] = [
        (&[(0, b"without")], "magic word"),
        (&[(field::TRACKS, zero)], "a cluster has 0 sectors"),
        (&[(field::TRACKS, &tracks)], "sectors, not from 1 to"),
        (&[(field::ENTRIES, &[0, 0, 0, 0x20])], "more than 536870911"),
        (&[(field::ENTRIES, &[5])], "the BAT has 5 entries, and the disk 6 clusters"),
        (&[(field::SECTORS, &[0xff; 8])], "more than any"),
        (&[(field::IN_USE, &[1])], "in_use is 0x1"),
        (&[(field::DATA_OFF, zero)], "data_off is sector 0"),
        (&[OLD, (field::ENTRIES, &[200]), (field::DATA_OFF, &[1, 0])], "data_off is sector 1, in front"),
    ];
    for (changes, why) in corrupt {
        let error = with(changes).unwrap_err();
        assert!(error.trouble == Trouble::Corrupt && error.text.contains(why), "{why}: {error}");
    }
    let error = with(&[(field::VERSION, &[3])]).unwrap_err();
    assert!(error.trouble == Trouble::Unsupported && error.text.contains("version 3"), "{error}");
}

#[test]
fn what_other_programs_write_is_taken() {
    // An old image counts with four bytes, and may leave it open where its data begins.
    let old = with(&[OLD, (field::TRACKS, &[63, 0]), (field::DATA_OFF, &[0; 4]), (field::ENTRIES, &[200]), (40, &[7])]);
    let old = old.unwrap();
    assert_eq!((old.variant, old.sectors, old.cluster_bytes(), old.unit()), (Variant::Sectors, 10241, 63 * 512, 512));
    assert_eq!((old.bat_end(), old.data_start(), old.disk_clusters()), (864, 1024, 163));
    assert_eq!(
        (old.slot(1024), old.slot(1024 + 63 * 512 * 3), old.slot(1536), old.slot(512)),
        (Some(0), Some(3), None, None)
    );
    assert_eq!((old.offset(2), old.entry(1024), old.entry(1025), old.entry(1 << 41)), (1024, Some(2), None, None));
    // QEMU moves the start of the data where a cluster is no power of two.
    let moved = with(&[(field::TRACKS, &[63, 0]), (field::DATA_OFF, &[64, 0]), (field::ENTRIES, &[163])]).unwrap();
    assert!(!moved.data_is_aligned() && moved.floor() == moved.bat_end());
    assert_eq!((moved.offset(1), moved.slot(63 * 512), moved.slot(64 * 512)), (63 * 512, Some(1), None));
    let newer = with(&[(field::IN_USE, b"v2.1"), (field::FLAGS, &[0xff]), (field::EXT_OFF, &[9])]).unwrap();
    assert_eq!((newer.in_use, newer.ext_off, newer.says_empty()), (InUse::Closed, 9, true));
    assert_eq!(
        (newer.slot(0), newer.slot(MIB), newer.entry(3 * MIB), newer.entry(512)),
        (None, Some(1), Some(3), None)
    );
}

#[test]
fn one_write_opens_an_image_and_nothing_else_of_it_changes() {
    let header = with(&[(field::FLAGS, &[0xff]), (field::EXT_OFF, &[9])]).unwrap();
    let mut after = bytes(5 * MIB + 512, MIB);
    after[field::ENTRIES..].copy_from_slice(&header.opened().update());
    assert_eq!(after[field::IN_USE..field::IN_USE + 4], *b"Ynot");
    let opened = Header::parse(&after).unwrap();
    assert_eq!(opened, Header { in_use: InUse::Open, flags: 0xfe, ext_off: 0, ..header });
    assert_eq!(opened, opened.opened());
}

fn section(magic: u64, flags: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = [magic, flags, data.len() as u64].map(u64::to_le_bytes).concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn extension(sections: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![0; EXTENSION_HEAD];
    bytes.extend(sections.concat());
    bytes.resize(1024, 0);
    let sum = checksum(&bytes[EXTENSION_HEAD..]);
    bytes[..8].copy_from_slice(&EXTENSION_MAGIC.to_le_bytes());
    bytes[8..EXTENSION_HEAD].copy_from_slice(&sum);
    bytes
}

fn bitmap(table: &[u64], count: u32) -> Vec<u8> {
    let mut data = vec![0; 28];
    data.extend(count.to_le_bytes());
    data.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
    data
}

#[test]
fn an_extension_has_sections() {
    let sections =
        [section(DIRTY_BITMAP, 0, &bitmap(&[0, 1, 99], 3)), section(5, 0, b"twelve bytes"), section(6, 0, b"")];
    let parsed = Extension::parse(&extension(&sections)).unwrap();
    let found: Vec<_> = parsed.sections.iter().map(|section| (section.magic, section.clusters.clone())).collect();
    assert_eq!(found, [(DIRTY_BITMAP, vec![99 * 512]), (5, vec![]), (6, vec![])]);
    assert_eq!((parsed.bitmaps(), parsed.must_stay()), (1, None));
    for (magic, flags, why) in [(5, 1, "not be changed"), (DIRTY_BITMAP, 1, "not be changed"), (5, 2, "not known")] {
        let parsed = Extension::parse(&extension(&[sections[0].clone(), section(magic, flags, &sections[0][24..])]));
        assert!(parsed.unwrap().must_stay().unwrap().contains(why), "{magic} {flags}");
    }
    let kept = Extension::parse(&extension(&[section(DIRTY_BITMAP, 2, &bitmap(&[], 0))])).unwrap();
    assert_eq!(kept.must_stay(), None, "a bitmap is known, and known to become wrong");
}

#[test]
fn an_extension_that_is_damaged_says_nothing() {
    for (bytes, why) in [
        (vec![], "magic number"),
        (vec![0; 1024], "magic number"),
        (extension(&[section(5, 0, &[0; 2000])]), "goes past its end"),
        (extension(&[section(5, 0, &[1; 976])]), "goes past its end"),
        (extension(&[section(DIRTY_BITMAP, 0, &[0; 20])]), "is cut off"),
        (extension(&[section(DIRTY_BITMAP, 0, &bitmap(&[2], 2))]), "is cut off"),
        (extension(&[section(DIRTY_BITMAP, 0, &bitmap(&[], u32::MAX))]), "is cut off"),
        (extension(&[section(DIRTY_BITMAP, 0, &bitmap(&[u64::MAX], 1))]), "is cut off"),
    ] {
        let mut bytes = bytes;
        bytes.truncate(1024);
        if bytes.len() == 1024 && !why.contains("magic") {
            let sum = checksum(&bytes[EXTENSION_HEAD..]);
            bytes[8..EXTENSION_HEAD].copy_from_slice(&sum);
        }
        let error = Extension::parse(&bytes).unwrap_err();
        assert!(error.trouble == Trouble::Corrupt && error.text.contains(why), "{why}: {error}");
    }
    let mut torn = extension(&[section(5, 0, b"x")]);
    torn[1000] = 1;
    assert!(Extension::parse(&torn).unwrap_err().text.contains("checksum"));
}
