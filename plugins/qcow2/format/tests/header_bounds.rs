//! Bounds of every header field: the last value that is taken, and the first that is not.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{
    autoclear, compatible, header_bytes_needed, incompatible, CompressionType, Header, HeaderErrorKind, HostOffset,
    Version, AUTOCLEAR_OFFSET, INCOMPATIBLE_OFFSET, L1_SIZE_FIELD, MAGIC, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_TABLE_FIELD,
};

/// A minimal header in a whole first cluster: no extensions, no backing file.
struct Image(Vec<u8>);

impl Image {
    fn new(version: u32, bits: u32) -> Self {
        let image = Self(vec![0; 1 << bits.min(21)]).put(0, &MAGIC).u32(4, version).u32(20, bits);
        let image = image.u64(24, 1 << bits).u32(36, 1).u64(40, 3 << bits).u64(48, 1 << bits).u32(56, 1);
        if version == 3 {
            image.u32(96, 4).u32(100, 104)
        } else {
            image
        }
    }

    fn put(mut self, at: usize, field: &[u8]) -> Self {
        self.0[at..at + field.len()].copy_from_slice(field);
        self
    }

    fn u32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    fn u64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    fn parse(&self) -> Header {
        Header::parse(&self.0).unwrap()
    }

    /// Refused as corrupt, because of the field at byte `field`.
    fn corrupt(&self, field: u64) {
        let error = Header::parse(&self.0).unwrap_err();
        assert_eq!((error.kind, error.offset), (HeaderErrorKind::Corrupt, field), "{error}");
    }
}

#[test]
fn cluster_bits() {
    for version in [2, 3] {
        for bits in 9..=21 {
            let image = Image::new(version, bits);
            assert_eq!(image.parse().cluster_size.bits(), bits);
            assert_eq!(header_bytes_needed(&image.0[..24]), Some(1 << bits));
        }
        for bits in [0, 1, 8, 22, 32, 64, 1 << 16, u32::MAX] {
            let image = Image::new(version, 9).u32(20, bits);
            image.corrupt(20);
            assert_eq!(header_bytes_needed(&image.0), None, "{bits}");
        }
    }
}

#[test]
fn versions() {
    assert_eq!(Image::new(2, 16).parse().version, Version::V2);
    assert_eq!(Image::new(3, 16).parse().version, Version::V3);
    for version in [0, 1, 4, 0x0300_0000, u32::MAX] {
        let error = Header::parse(&Image::new(3, 16).u32(4, version).0).unwrap_err();
        assert_eq!((error.kind, error.offset), (HeaderErrorKind::Unsupported, 4), "{version}");
    }
}

#[test]
fn every_field_of_version_2() {
    // Bytes from 72 on are extensions here, never feature bits: their values must not matter.
    let image = Image::new(2, 12).u64(24, 2 << 20).u32(32, 1).u32(36, 77).u64(40, 0x7000).u64(48, 0x5000);
    let image = image.u32(56, 3).u32(60, 2).u64(64, 0x9000).u64(8, 2048).u32(16, 4).put(2048, b"base");
    let image = image.u32(72, 0xE279_2ACA).u32(76, 3).put(80, b"raw").u32(88, 0x7777_0000).u32(92, 0);
    let h = image.parse();
    assert_eq!((h.version, h.cluster_size.bits(), h.virtual_size, h.crypt_method), (Version::V2, 12, 2 << 20, 1));
    assert_eq!((h.l1_entries, h.l1_table, h.l1_bytes()), (77, HostOffset(0x7000), 616));
    assert_eq!((h.refcount_table, h.refcount_table_clusters), (HostOffset(0x5000), 3));
    assert_eq!(h.refcount_table_bytes(), 3 << 12);
    assert_eq!((h.snapshots, h.snapshot_table), (2, HostOffset(0x9000)));
    assert_eq!((h.incompatible, h.compatible, h.autoclear, h.refcount_order.order()), (0, 0, 0, 4));
    assert_eq!((h.header_length, h.compression, h.l2_entry_bytes()), (72, CompressionType::Zlib, 8));
    assert_eq!(h.backing_name.as_deref(), Some(&b"base"[..]));
    assert_eq!(h.backing_format(), Some(&b"raw"[..]));
    assert_eq!(h.extensions.len(), 2);
}

#[test]
fn virtual_size() {
    // 2 MiB clusters: an L2 table maps 512 GiB, 4 Mi entries of the L1 table map 2 EiB.
    let coverage = 1u64 << 39;
    let most = MAX_L1_BYTES / 8 * coverage;
    let entries = u32::try_from(MAX_L1_BYTES / 8).unwrap();
    assert_eq!(Image::new(3, 21).u64(24, most).u32(36, entries).parse().virtual_size, most);
    Image::new(3, 21).u64(24, most + 1).u32(36, entries).corrupt(36);
    Image::new(3, 21).u64(24, 1 << 63).u32(36, entries).corrupt(24);
    Image::new(3, 21).u64(24, u64::MAX).u32(36, entries).corrupt(24);
    // Sizes within a sector or a cluster count as a whole one.
    assert_eq!(Image::new(3, 21).u64(24, coverage - 1).parse().l1_entries, 1);
    Image::new(3, 21).u64(24, coverage + 1).corrupt(36);
    // An empty disk needs no L1 table, and its offset says nothing then.
    let h = Image::new(3, 16).u64(24, 0).u32(36, 0).u64(40, 0).parse();
    assert_eq!((h.virtual_size, h.l1_entries, h.l1_bytes()), (0, 0, 0));
    Image::new(3, 16).u64(24, 1).u32(36, 0).corrupt(36);
}

#[test]
fn l1_table() {
    let most = u32::try_from(MAX_L1_BYTES / 8).unwrap();
    assert_eq!(Image::new(3, 9).u32(36, most).parse().l1_bytes(), MAX_L1_BYTES);
    Image::new(3, 9).u32(36, most + 1).corrupt(36);
    Image::new(3, 9).u32(36, u32::MAX).corrupt(36);
    for (field, entries) in [(40, 36), (48, 56), (64, 60)] {
        for bits in [9, 16, 21] {
            let image = |offset| Image::new(3, bits).u32(entries, 1).u64(64, 5 << bits).u64(field, offset);
            let at = u64::try_from(field).unwrap();
            image(i64::MAX as u64 >> bits << bits).parse();
            image(0).corrupt(at);
            image((1 << bits) - 512).corrupt(at);
            image((1 << bits) + 1).corrupt(at);
            image(1 << 63).corrupt(at);
            image(u64::MAX).corrupt(at);
        }
    }
    // No snapshots: their offset says nothing.
    assert_eq!(Image::new(3, 16).u64(64, 3).parse().snapshots, 0);
    assert_eq!(L1_SIZE_FIELD, 36);
}

#[test]
fn refcount_table() {
    for bits in 9..=21 {
        let most = u32::try_from(MAX_REFCOUNT_TABLE_BYTES >> bits).unwrap();
        assert_eq!(Image::new(3, bits).u32(56, most).parse().refcount_table_bytes(), MAX_REFCOUNT_TABLE_BYTES);
        for wrong in [0, most + 1, u32::MAX] {
            Image::new(3, bits).u32(56, wrong).corrupt(56);
        }
    }
    for order in 0..=6 {
        assert_eq!(Image::new(3, 16).u32(96, order).parse().refcount_order.order(), order);
        // Version 2 has no such field.
        assert_eq!(Image::new(2, 16).u32(72, 0).u32(96, order).parse().refcount_order.order(), 4);
    }
    for order in [7, 8, 64, u32::MAX] {
        Image::new(3, 16).u32(96, order).corrupt(96);
    }
    assert_eq!(REFCOUNT_TABLE_FIELD, 48);
}

#[test]
fn header_length_and_what_lies_within_it() {
    for (bits, length, good) in
        [(16, 104, true), (16, 112, true), (16, 120, true), (9, 512, true), (9, 513, false), (16, 65536, true)]
    {
        let image = Image::new(3, bits).u32(100, length);
        if good {
            assert_eq!(image.parse().header_length, length);
        } else {
            image.corrupt(100);
        }
    }
    for length in [0, 71, 72, 103, 105, 108, 65532, 65537, 65544, 1 << 31, u32::MAX] {
        Image::new(3, 16).u32(100, length).corrupt(100);
    }
    // Fields that a longer header may have some day are passed over, and are no extensions.
    let h = Image::new(3, 16).u32(100, 128).put(112, &[0xff; 16]).parse();
    assert!(h.extensions.is_empty());
    // A header that is not longer than 104 bytes has no compression_type: the byte belongs to an extension.
    let h = Image::new(3, 16).u32(104, 0x0100_0000).u32(108, 0).parse();
    assert_eq!((h.compression, h.extensions.len()), (CompressionType::Zlib, 1));
}

#[test]
fn compression_types_and_their_feature_bit() {
    let image = |kind, bits| Image::new(3, 16).u32(100, 112).put(104, &[kind]).u64(72, bits);
    assert_eq!(image(0, 0).parse().compression, CompressionType::Zlib);
    assert_eq!(image(1, incompatible::COMPRESSION_TYPE).parse().compression, CompressionType::Zstd);
    image(1, 0).corrupt(72);
    image(0, incompatible::COMPRESSION_TYPE).corrupt(72);
    Image::new(3, 16).u64(72, incompatible::COMPRESSION_TYPE).corrupt(72);
    for kind in 2..=255 {
        let error = Header::parse(&image(kind, 8).0).unwrap_err();
        assert_eq!((error.kind, error.offset), (HeaderErrorKind::Unsupported, 104));
    }
    // Padding, which is not looked at.
    assert_eq!(image(0, 0).put(105, &[0xff; 7]).parse().compression, CompressionType::Zlib);
}

#[test]
fn every_feature_bit_is_reported_as_it_is() {
    for bit in (0..64).filter(|&bit| bit != 3) {
        let h = Image::new(3, 16).u64(72, 1 << bit).parse();
        assert_eq!((h.incompatible, h.compatible, h.autoclear), (1 << bit, 0, 0));
        assert!(h.has(1 << bit) && !h.has(!(1 << bit)));
        assert_eq!(h.l2_entry_bytes(), if bit == 4 { 16 } else { 8 });
        assert_eq!((h.l2_entries(), h.l2_coverage() >> 16), if bit == 4 { (4096, 4096) } else { (8192, 8192) });
        let h = Image::new(3, 16).u64(80, 1 << bit).parse();
        assert_eq!((h.incompatible, h.compatible, h.autoclear), (0, 1 << bit, 0));
        let h = Image::new(3, 16).u64(88, 1 << bit).parse();
        assert_eq!((h.incompatible, h.compatible, h.autoclear), (0, 0, 1 << bit));
    }
    use incompatible::{COMPRESSION_TYPE, CORRUPT, DATA_FILE, DIRTY, EXTENDED_L2, KNOWN};
    assert_eq!([DIRTY, CORRUPT, DATA_FILE, COMPRESSION_TYPE, EXTENDED_L2], [1, 2, 4, 8, 16]);
    assert_eq!(DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2, KNOWN);
    assert_eq!((compatible::LAZY_REFCOUNTS, autoclear::BITMAPS, autoclear::DATA_FILE_RAW), (1, 1, 2));
    assert_eq!((INCOMPATIBLE_OFFSET, AUTOCLEAR_OFFSET), (72, 88));
}

#[test]
fn extended_entries_halve_what_an_l1_entry_maps() {
    let coverage = 4096u64 << 16;
    Image::new(3, 16).u64(72, 16).u64(24, coverage).parse();
    Image::new(3, 16).u64(72, 16).u64(24, coverage + 1).corrupt(36);
    Image::new(3, 16).u64(24, coverage + 1).parse();
}

#[test]
fn encryption_methods_are_reported_as_they_are() {
    for method in [0, 1, 2, 3, u32::MAX] {
        assert_eq!(Image::new(3, 16).u32(32, method).parse().crypt_method, method);
    }
}

#[test]
fn backing_name() {
    let name = |at: u64, length: u32| Image::new(3, 12).u64(8, at).u32(16, length).put(104, &[0; 8]);
    assert_eq!(name(0, 0).parse().backing_name, None);
    // No offset, no name, whatever the length.
    assert_eq!(name(0, u32::MAX).parse().backing_name, None);
    assert_eq!(name(112, 0).parse().backing_name, None);
    assert_eq!(name(112, 1023).parse().backing_name.unwrap().len(), 1023);
    name(112, 1024).corrupt(16);
    name(112, u32::MAX).corrupt(16);
    // Right behind the header, and up to the last byte of the first cluster.
    assert_eq!(name(104, 9).parse().backing_name, Some(vec![0; 9]));
    assert_eq!(name(4096 - 9, 9).put(4087, b"last byte").parse().backing_name.unwrap(), b"last byte");
    name(4096 - 9, 10).corrupt(8);
    name(103, 9).corrupt(8);
    name(4096, 1).corrupt(8);
    name(4097, 1).corrupt(8);
    name(1 << 63, 1).corrupt(8);
    name(u64::MAX, 1).corrupt(8);
    // Bytes that are no text stay as they are.
    assert_eq!(name(2000, 3).put(2000, &[0, 0xff, b'/']).parse().backing_name, Some(vec![0, 0xff, b'/']));
    // A file that ends within the name.
    let error = Header::parse(&name(112, 100).0[..211]).unwrap_err();
    assert_eq!(error.kind, HeaderErrorKind::Truncated);
    assert!(Header::parse(&name(112, 100).0[..212]).is_ok());
}
