//! The header: every field of the specification, each in its place, and each way in which it can be wrong.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{
    header_bytes_needed, incompatible, CompressionType, ExtensionKind, Header, HeaderErrorKind, HostOffset,
    RefcountOrder, Version,
};
use proptest::prelude::*;

const CLUSTER: usize = 1 << 16;

/// A header of version 3 in a cluster of its own; every field has a value that no other has.
fn v3() -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(8, &1024u64.to_be_bytes());
    put(16, &9u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(3u64 << 30).to_be_bytes());
    put(32, &2u32.to_be_bytes());
    put(36, &7u32.to_be_bytes());
    put(40, &0x3_0000u64.to_be_bytes());
    put(48, &0x1_0000u64.to_be_bytes());
    put(56, &2u32.to_be_bytes());
    put(60, &5u32.to_be_bytes());
    put(64, &0x9_0000u64.to_be_bytes());
    put(72, &(1u64 << 40 | incompatible::COMPRESSION_TYPE).to_be_bytes());
    put(80, &(1u64 << 41).to_be_bytes());
    put(88, &(1u64 << 42).to_be_bytes());
    put(96, &3u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    put(104, &[1]);
    put(112, &0xE279_2ACAu32.to_be_bytes());
    put(116, &5u32.to_be_bytes());
    put(120, b"qcow2");
    put(128, &0x6803_F857u32.to_be_bytes());
    put(132, &48u32.to_be_bytes());
    put(136, &[0, 40]);
    put(138, b"future feature");
    put(184, &0x2385_2875u32.to_be_bytes());
    put(188, &24u32.to_be_bytes());
    put(192, &4u32.to_be_bytes());
    put(200, &96u64.to_be_bytes());
    put(208, &0xa_0000u64.to_be_bytes());
    put(216, &0x1234_5678u32.to_be_bytes());
    put(220, &1u32.to_be_bytes());
    put(224, &[9]);
    put(1024, b"base.qcow");
    bytes
}

fn v2() -> Vec<u8> {
    let mut bytes = v3();
    bytes[4..8].copy_from_slice(&2u32.to_be_bytes());
    bytes[72..112].fill(0);
    bytes
}

#[test]
fn every_field_of_version_3() {
    let h = Header::parse(&v3()).unwrap();
    assert_eq!(h.version, Version::V3);
    assert_eq!(h.cluster_size.bytes(), 65536);
    assert_eq!(h.virtual_size, 3 << 30);
    assert_eq!(h.backing_name.as_deref(), Some(&b"base.qcow"[..]));
    assert_eq!(h.crypt_method, 2);
    assert_eq!((h.l1_entries, h.l1_table, h.l1_bytes()), (7, HostOffset(0x3_0000), 56));
    assert_eq!((h.refcount_table, h.refcount_table_clusters), (HostOffset(0x1_0000), 2));
    assert_eq!(h.refcount_table_bytes(), 131_072);
    assert_eq!((h.snapshots, h.snapshot_table), (5, HostOffset(0x9_0000)));
    assert_eq!((h.incompatible, h.compatible, h.autoclear), (1 << 40 | 8, 1 << 41, 1 << 42));
    assert_eq!(h.refcount_order.bits(), 8);
    assert_eq!(h.header_length, 112);
    assert_eq!(h.compression, CompressionType::Zstd);
    assert_eq!(h.backing_format(), Some(&b"qcow2"[..]));
    assert_eq!(h.feature_name(0, 40).as_deref(), Some(&b"future feature"[..]));
    assert_eq!(h.feature_name(1, 40), None);
    let bitmaps = h.bitmaps().unwrap();
    assert_eq!((bitmaps.count, bitmaps.directory_size, bitmaps.directory_offset), (4, 96, 0xa_0000));
    let unknown = h.extension(ExtensionKind::Unknown(0x1234_5678)).unwrap();
    assert_eq!((unknown.offset, unknown.data.as_slice()), (216, &[9u8][..]));
    assert_eq!(h.extensions.len(), 4);
    assert!(!h.has(incompatible::DIRTY));
}

#[test]
fn version_2_has_no_feature_bits_and_16_bit_refcounts() {
    let h = Header::parse(&v2()).unwrap();
    assert_eq!(h.version, Version::V2);
    assert_eq!((h.incompatible, h.compatible, h.autoclear), (0, 0, 0));
    assert_eq!(h.refcount_order, RefcountOrder::BITS_16);
    assert_eq!((h.header_length, h.compression), (72, CompressionType::Zlib));
    // The extensions of version 2 begin at byte 72; the test image has an end marker there.
    assert!(h.extensions.is_empty());
}

#[test]
fn each_field_that_can_be_wrong() {
    let cases: &[(usize, &[u8], HeaderErrorKind, &str)] = &[
        (0, b"QFJ\xfb", HeaderErrorKind::NotQcow2, "magic"),
        (4, &[0, 0, 0, 1], HeaderErrorKind::Unsupported, "version 1"),
        (4, &[0, 0, 0, 4], HeaderErrorKind::Unsupported, "version 4"),
        (20, &[0, 0, 0, 8], HeaderErrorKind::Corrupt, "cluster_bits is 8"),
        (20, &[0, 0, 0, 22], HeaderErrorKind::Corrupt, "cluster_bits is 22"),
        (20, &[0xff; 4], HeaderErrorKind::Corrupt, "cluster_bits"),
        (24, &[0xff; 8], HeaderErrorKind::Corrupt, "virtual size"),
        (36, &[0, 0, 0, 5], HeaderErrorKind::Corrupt, "l1_size is 5, too small"),
        (36, &[0x7f, 0xff, 0xff, 0xff], HeaderErrorKind::Corrupt, "more than 32 MiB"),
        (40, &[0, 0, 0, 0, 0, 0, 2, 0], HeaderErrorKind::Corrupt, "l1_table_offset"),
        (40, &[0; 8], HeaderErrorKind::Corrupt, "l1_table_offset"),
        (48, &[0, 0, 0, 0, 0, 0, 0, 1], HeaderErrorKind::Corrupt, "refcount_table_offset"),
        (48, &[0xff; 8], HeaderErrorKind::Corrupt, "refcount_table_offset"),
        (56, &[0; 4], HeaderErrorKind::Corrupt, "refcount_table_clusters is 0"),
        (56, &[0xff; 4], HeaderErrorKind::Corrupt, "refcount_table_clusters"),
        (64, &[0, 0, 0, 0, 0, 0, 0, 1], HeaderErrorKind::Corrupt, "snapshots_offset"),
        (96, &[0, 0, 0, 7], HeaderErrorKind::Corrupt, "refcount_order is 7"),
        (100, &[0, 0, 0, 72], HeaderErrorKind::Corrupt, "header_length is 72"),
        (100, &[0xff; 4], HeaderErrorKind::Corrupt, "header_length"),
        (79, &[0], HeaderErrorKind::Corrupt, "contradict"),
        (104, &[0], HeaderErrorKind::Corrupt, "contradict"),
        (104, &[2], HeaderErrorKind::Unsupported, "compression_type 2"),
        (8, &[0, 0, 0, 0, 0, 1, 0, 0], HeaderErrorKind::Corrupt, "backing_file_offset"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 8], HeaderErrorKind::Corrupt, "backing_file_offset"),
        (16, &[0, 0, 4, 0], HeaderErrorKind::Corrupt, "backing_file_size is 1024"),
        (116, &[0, 0, 4, 0], HeaderErrorKind::Corrupt, "does not fit"),
        (188, &[0xff; 4], HeaderErrorKind::Corrupt, "does not fit"),
    ];
    for (at, field, kind, word) in cases {
        let mut bytes = v3();
        bytes[*at..*at + field.len()].copy_from_slice(field);
        let error = Header::parse(&bytes).unwrap_err();
        assert_eq!(error.kind, *kind, "{at}: {error}");
        assert!(error.text.contains(word), "{at}: {error}");
    }
}

#[test]
fn a_header_that_is_cut_off() {
    let bytes = v3();
    for length in 0..bytes.len().min(1100) {
        let result = Header::parse(&bytes[..length]);
        // From the end of the name on, everything is there.
        assert_eq!(result.is_ok(), length >= 1033, "{length}");
    }
}

#[test]
fn how_much_of_a_file_is_the_header() {
    assert_eq!(header_bytes_needed(&v3()), Some(65536));
    assert_eq!(header_bytes_needed(&v3()[..23]), None);
    assert_eq!(header_bytes_needed(b"QFJ\xfb                        "), None);
    assert_eq!(header_bytes_needed(b"QFI\xfb                        "), None);
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn no_change_of_a_good_header_makes_the_parser_panic(
        changes in prop::collection::vec((0..300usize, any::<u8>()), 0..12),
        length in 0..1200usize,
    ) {
        let mut bytes = v3();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Ok(header) = Header::parse(&bytes[..length]) {
            prop_assert!(header.l1_bytes() <= 32 << 20);
            prop_assert!(header.refcount_table_bytes() <= 8 << 20);
            prop_assert!(header.backing_name.is_none_or(|name| name.len() <= 1023));
        }
    }
}
