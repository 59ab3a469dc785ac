//! Header extensions: every type, their padding, their end, and what they may not do.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{
    create, Bitmaps, ClusterSize, CreateOptions, Extension, ExtensionKind, FeatureName, Header, HeaderErrorKind,
};
use proptest::prelude::*;

/// Where the extensions of the test image begin.
const START: usize = 112;

/// A new image without extensions, of clusters of 4 KiB.
fn bare() -> Vec<u8> {
    let mut options = CreateOptions::new(1 << 20);
    options.cluster_size = ClusterSize::from_bits(12).unwrap();
    let mut bytes = create(&options).unwrap().metadata;
    bytes.truncate(4096);
    assert!(Header::parse(&bytes).unwrap().extensions.is_empty());
    bytes
}

fn put_extension(bytes: &mut [u8], at: usize, kind: u32, data: &[u8]) -> usize {
    bytes[at..at + 4].copy_from_slice(&kind.to_be_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
    (at + 8 + data.len()).next_multiple_of(8)
}

fn with(kind: u32, data: &[u8]) -> Header {
    let mut bytes = bare();
    put_extension(&mut bytes, START, kind, data);
    Header::parse(&bytes).unwrap()
}

const KINDS: [(u32, ExtensionKind); 5] = [
    (0xE279_2ACA, ExtensionKind::BackingFormat),
    (0x6803_F857, ExtensionKind::FeatureNames),
    (0x2385_2875, ExtensionKind::Bitmaps),
    (0x0537_BE77, ExtensionKind::Encryption),
    (0x4441_5441, ExtensionKind::DataFile),
];

#[test]
fn every_type() {
    for (number, kind) in KINDS {
        assert_eq!((ExtensionKind::from_u32(number), kind.to_u32()), (kind, number));
        let header = with(number, b"twenty bytes of data");
        let expected = Extension { kind, offset: 112, data: b"twenty bytes of data".to_vec() };
        assert_eq!(header.extensions, std::slice::from_ref(&expected));
        assert_eq!(header.extension(kind), Some(&expected));
        for (_, other) in KINDS {
            assert_eq!(header.extension(other).is_some(), other == kind);
        }
    }
    assert_eq!(ExtensionKind::from_u32(1), ExtensionKind::Unknown(1));
    assert_eq!(with(0xffff_ffff, &[]).extensions[0].kind, ExtensionKind::Unknown(0xffff_ffff));
}

#[test]
fn the_first_of_a_type_counts() {
    let mut bytes = bare();
    let next = put_extension(&mut bytes, START, 0xE279_2ACA, b"raw");
    put_extension(&mut bytes, next, 0xE279_2ACA, b"qcow2");
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.extensions.len(), 2);
    assert_eq!(header.backing_format(), Some(&b"raw"[..]));
}

#[test]
fn lengths_up_to_the_end_of_the_cluster() {
    let room = 4096 - START - 8;
    let all = with(7, &vec![1; room]);
    assert_eq!(all.extensions[0].data.len(), room);
    // Padding may be cut off by the end of the cluster, data may not.
    for (length, good) in [(room - 1, true), (room, true), (room + 1, false), (u32::MAX as usize, false)] {
        let mut bytes = bare();
        put_extension(&mut bytes, START, 7, &[]);
        bytes[START + 4..START + 8].copy_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        match Header::parse(&bytes) {
            Ok(header) => assert!(good && header.extensions[0].data.len() == length),
            Err(error) => assert!(!good && error.kind == HeaderErrorKind::Corrupt && error.offset == 112, "{error}"),
        }
    }
}

#[test]
fn they_end_before_the_backing_name() {
    let mut bytes = bare();
    bytes[8..16].copy_from_slice(&(START as u64 + 24).to_be_bytes());
    bytes[16..20].copy_from_slice(&8u32.to_be_bytes());
    // No end marker: the name follows right behind, and would look like one more.
    let next = put_extension(&mut bytes, START, 7, b"sixteen bytes...");
    bytes[next..next + 8].copy_from_slice(b"basename");
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.backing_name.as_deref(), Some(&b"basename"[..]));
    assert_eq!(header.extensions.len(), 1);
    // One that reaches into the name.
    bytes[START + 7] = 17;
    assert_eq!(Header::parse(&bytes).unwrap_err().offset, 112);
}

#[test]
fn an_end_marker_with_a_length_ends_them_as_well() {
    let mut bytes = bare();
    put_extension(&mut bytes, START, 0, &[0xff; 16]);
    assert!(Header::parse(&bytes).unwrap().extensions.is_empty());
}

#[test]
fn feature_names() {
    let mut table = vec![0; 48 * 3 + 47];
    table[0..2].copy_from_slice(&[0, 40]);
    table[2..48].fill(b'x');
    table[48..50].copy_from_slice(&[1, 0]);
    table[50..54].copy_from_slice(b"lazy");
    table[96..98].copy_from_slice(&[2, 63]);
    let names = FeatureName::parse_table(&table);
    // 46 characters without a null; padded with nulls; none at all. What is no whole entry is ignored.
    assert_eq!(names.len(), 3);
    assert_eq!((names[0].class, names[0].bit, names[0].name.as_slice()), (0, 40, &[b'x'; 46][..]));
    assert_eq!((names[1].class, names[1].bit, names[1].name.as_slice()), (1, 0, &b"lazy"[..]));
    assert_eq!((names[2].class, names[2].bit, names[2].name.as_slice()), (2, 63, &b""[..]));
    assert!(FeatureName::parse_table(&[]).is_empty());
    let header = with(0x6803_F857, &table);
    assert_eq!(header.feature_name(1, 0).as_deref(), Some(&b"lazy"[..]));
    assert_eq!(header.feature_name(0, 0), None);
    assert_eq!(header.feature_name(1, 40), None);
}

#[test]
fn bitmaps() {
    let mut data = [0; 24];
    data[..4].copy_from_slice(&0x0102_0304u32.to_be_bytes());
    data[8..16].copy_from_slice(&0x0506_0708_090a_0b0cu64.to_be_bytes());
    data[16..].copy_from_slice(&0x0d0e_0f10_1112_1314u64.to_be_bytes());
    let expected =
        Bitmaps { count: 0x0102_0304, directory_size: 0x0506_0708_090a_0b0c, directory_offset: 0x0d0e_0f10_1112_1314 };
    assert_eq!(with(0x2385_2875, &data).bitmaps(), Some(expected));
    for length in 0..24 {
        assert_eq!(with(0x2385_2875, &data[..length]).bitmaps(), None, "{length}");
    }
    assert_eq!(Header::parse(&bare()).unwrap().bitmaps(), None);
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        all in prop::collection::vec((1..=u32::MAX, prop::collection::vec(any::<u8>(), 0..90)), 0..12),
    ) {
        let mut bytes = bare();
        let mut at = START;
        let mut expected = Vec::new();
        for (kind, data) in &all {
            expected.push(Extension { kind: ExtensionKind::from_u32(*kind), offset: at as u64, data: data.clone() });
            at = put_extension(&mut bytes, at, *kind, data);
        }
        prop_assert_eq!(Header::parse(&bytes).unwrap().extensions, expected);
    }
}
