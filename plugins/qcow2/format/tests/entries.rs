//! Table entries of every kind at every cluster size: each bit by itself, and round trips.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{
    BitmapTableEntry, ClusterSize, CompressedRange, EntryError, HostOffset, L1Entry, L2Entry, RefcountTableEntry,
    Subclusters, Version, COPIED, SUBCLUSTERS,
};
use proptest::prelude::*;

const COMPRESSED: u64 = 1 << 62;

fn sizes() -> impl Iterator<Item = ClusterSize> {
    (9..=21).map(|bits| ClusterSize::from_bits(bits).unwrap())
}

/// An offset for each bit that an offset may have: 9 to 55, as far as the cluster size allows.
fn offsets(size: ClusterSize) -> impl Iterator<Item = u64> {
    (size.bits()..56).map(|bit| 1 << bit)
}

#[test]
fn l1_entries_bit_by_bit() {
    for size in sizes() {
        for offset in offsets(size) {
            for copied in [false, true] {
                let raw = offset | u64::from(copied) << 63;
                let entry = L1Entry::Table { offset: HostOffset(offset), copied };
                assert_eq!(L1Entry::decode(raw, size), Ok(entry));
                assert_eq!(entry.encode(), raw);
            }
        }
        for bit in 9..size.bits() {
            assert_eq!(L1Entry::decode(1 << bit, size), Err(EntryError::Unaligned(HostOffset(1 << bit))));
        }
        for bit in (0..9).chain(56..63) {
            for base in [0, COPIED, 1 << 40, COPIED | 1 << 40] {
                assert_eq!(L1Entry::decode(base | 1 << bit, size), Err(EntryError::Reserved(1 << bit)), "{bit}");
            }
        }
    }
    assert_eq!(L1Entry::Unallocated.encode(), 0);
}

#[test]
fn standard_l2_entries_bit_by_bit() {
    for size in sizes() {
        for version in [Version::V2, Version::V3] {
            for offset in offsets(size) {
                for copied in [false, true] {
                    let (host, raw) = (HostOffset(offset), offset | u64::from(copied) << 63);
                    let data = L2Entry::Data { offset: host, copied };
                    assert_eq!(L2Entry::decode(raw, size, version), Ok(data));
                    assert_eq!((data.encode(), data.host()), (raw, Some((host, copied))));
                    let zero = L2Entry::Zero { offset: Some(host), copied };
                    let expected = if version == Version::V3 { Ok(zero) } else { Err(EntryError::Reserved(1)) };
                    assert_eq!(L2Entry::decode(raw | 1, size, version), expected);
                    assert_eq!((zero.encode(), zero.host()), (raw | 1, Some((host, copied))));
                }
            }
            for bit in 9..size.bits() {
                let unaligned = Err(EntryError::Unaligned(HostOffset(1 << bit)));
                assert_eq!(L2Entry::decode(1 << bit, size, version), unaligned);
            }
            for bit in (1..9).chain(56..62) {
                for base in [0, COPIED, 1 << 40] {
                    let reserved = Err(EntryError::Reserved(1 << bit));
                    assert_eq!(L2Entry::decode(base | 1 << bit, size, version), reserved, "{bit}");
                }
            }
            // In a compressed entry every bit below 62 belongs to the descriptor, alignment or not.
            for bit in 0..62 {
                let entry = L2Entry::Compressed { descriptor: 1 << bit };
                assert_eq!(L2Entry::decode(COMPRESSED | 1 << bit, size, version), Ok(entry));
                assert_eq!((entry.encode(), entry.host()), (COMPRESSED | 1 << bit, None));
            }
            let owned = L2Entry::decode(COMPRESSED | COPIED, size, version);
            assert_eq!(owned, Err(EntryError::OwnsCompressed));
            assert_eq!(L2Entry::decode(COPIED, size, version), Err(EntryError::OwnsNothing));
            assert_eq!(L2Entry::decode(0, size, version), Ok(L2Entry::Unallocated));
        }
        let zero = L2Entry::Zero { offset: None, copied: false };
        assert_eq!((zero.encode(), zero.host()), (1, None));
    }
    assert_eq!((L2Entry::Unallocated.encode(), L2Entry::Unallocated.host()), (0, None));
}

#[test]
fn refcount_table_entries_bit_by_bit() {
    for size in sizes() {
        for bit in 0..64 {
            let expected = match bit {
                0..9 => Err(EntryError::Reserved(1 << bit)),
                _ if bit < size.bits() => Err(EntryError::Unaligned(HostOffset(1 << bit))),
                _ => Ok(RefcountTableEntry::Block(HostOffset(1 << bit))),
            };
            assert_eq!(RefcountTableEntry::decode(1 << bit, size), expected, "{bit}");
        }
    }
}

#[test]
fn bitmap_table_entries_at_every_cluster_size() {
    for size in sizes() {
        for offset in offsets(size) {
            let entry = BitmapTableEntry::Data(HostOffset(offset));
            assert_eq!((BitmapTableEntry::decode(offset, size), entry.encode()), (Ok(entry), offset));
        }
        for bit in 9..size.bits() {
            let unaligned = Err(EntryError::Unaligned(HostOffset(1 << bit)));
            assert_eq!(BitmapTableEntry::decode(1 << bit, size), unaligned);
        }
    }
}

/// Every subcluster state beside every other kind of its neighbors, at every cluster size that has them.
#[test]
fn extended_l2_entries_bit_by_bit() {
    for size in sizes() {
        let decode = |entry, bitmap| Subclusters::decode(entry, bitmap, size);
        let host = 1u64 << 40;
        if size.bits() < 14 {
            for (entry, bitmap) in [(0, 0), (host, 0xffff_ffff), (COMPRESSED, 0)] {
                assert_eq!(decode(entry, bitmap), Err(EntryError::Subclusters(bitmap)));
            }
            continue;
        }
        for i in 0..SUBCLUSTERS {
            let bit = 1u32 << i;
            for copied in [false, true] {
                let entry = host | u64::from(copied) << 63;
                let data = L2Entry::Data { offset: HostOffset(host), copied };
                for mixed in [Subclusters { allocated: bit, zero: 0 }, Subclusters { allocated: !bit, zero: bit }] {
                    let raw = mixed.encode(Some((HostOffset(host), copied)));
                    assert_eq!(raw, (entry, u64::from(mixed.zero) << 32 | u64::from(mixed.allocated)));
                    assert_eq!(decode(raw.0, raw.1), Ok((data, Some(mixed))));
                }
            }
            let none = Subclusters { allocated: 0, zero: bit };
            assert_eq!(none.encode(None), (0, u64::from(bit) << 32));
            let read = (L2Entry::Zero { offset: None, copied: false }, Some(none));
            assert_eq!(decode(0, u64::from(bit) << 32), Ok(read));
            // Data and zeroes at once; data without a cluster; either beside a compressed cluster.
            let both = u64::from(bit) << 32 | u64::from(bit);
            assert_eq!(decode(host, both), Err(EntryError::Subclusters(both)));
            assert_eq!(decode(0, u64::from(bit)), Err(EntryError::Subclusters(u64::from(bit))));
            for bitmap in [u64::from(bit), u64::from(bit) << 32] {
                assert_eq!(decode(COMPRESSED | 5, bitmap), Err(EntryError::Subclusters(bitmap)));
            }
        }
        // There is no zero flag in the first half: bit 0 is reserved as the others are.
        for bit in (0..9).chain(56..62) {
            assert_eq!(decode(host | 1 << bit, 1), Err(EntryError::Reserved(1 << bit)));
        }
        assert_eq!(decode(host | 1 << 13, 1), Err(EntryError::Unaligned(HostOffset(host | 1 << 13))));
        assert_eq!(decode(COPIED, 0), Err(EntryError::OwnsNothing));
        assert_eq!(decode(COPIED | COMPRESSED, 0), Err(EntryError::OwnsCompressed));
        assert_eq!(decode(COMPRESSED | 5, 0), Ok((L2Entry::Compressed { descriptor: 5 }, None)));
    }
}

/// Reserved bits are named before anything else, and every error says something.
#[test]
fn errors_are_clauses() {
    let offset = HostOffset(513);
    for (error, word) in [
        (EntryError::Reserved(0x100), "0x100"),
        (EntryError::Unaligned(offset), "513"),
        (EntryError::OwnsNothing, "points to none"),
        (EntryError::OwnsCompressed, "compressed"),
        (EntryError::Subclusters(0xabc), "0xabc"),
    ] {
        assert!(error.to_string().contains(word), "{error}");
    }
}

fn any_size() -> impl Strategy<Value = ClusterSize> {
    (9..22u32).prop_map(|bits| ClusterSize::from_bits(bits).unwrap())
}

/// An offset as it may stand in an entry of this cluster size, never 0.
fn offset_of(size: ClusterSize, seed: u64) -> u64 {
    let clusters = (1u64 << (56 - size.bits())) - 1;
    (1 + seed % clusters) << size.bits()
}

proptest! {
    #[test]
    fn entries_come_back(size in any_size(), seed: u64, copied: bool, descriptor in 0..COMPRESSED) {
        let offset = HostOffset(offset_of(size, seed));
        let l1 = L1Entry::Table { offset, copied };
        prop_assert_eq!(L1Entry::decode(l1.encode(), size), Ok(l1));
        for l2 in [
            L2Entry::Unallocated,
            L2Entry::Zero { offset: None, copied: false },
            L2Entry::Zero { offset: Some(offset), copied },
            L2Entry::Data { offset, copied },
            L2Entry::Compressed { descriptor },
        ] {
            prop_assert_eq!(L2Entry::decode(l2.encode(), size, Version::V3), Ok(l2));
        }
        let block = RefcountTableEntry::decode(offset.0, size);
        prop_assert_eq!(block, Ok(RefcountTableEntry::Block(offset)));
    }

    #[test]
    fn subclusters_come_back(bits in 14..22u32, seed: u64, copied: bool, a: u32, z: u32, exists: bool) {
        let size = ClusterSize::from_bits(bits).unwrap();
        let host = exists.then_some((HostOffset(offset_of(size, seed)), copied));
        let state = Subclusters { allocated: if exists { a } else { 0 }, zero: z & !a };
        let (entry, bitmap) = state.encode(host);
        let (standard, mixed) = Subclusters::decode(entry, bitmap, size).unwrap();
        // Whatever it is called, each subcluster reads the same.
        let (allocated, zero) = match (standard, mixed) {
            (_, Some(mixed)) => (mixed.allocated, mixed.zero),
            (L2Entry::Data { .. }, None) => (u32::MAX, 0),
            (L2Entry::Zero { .. }, None) => (0, u32::MAX),
            _ => (0, 0),
        };
        prop_assert_eq!((allocated, zero), (state.allocated, state.zero));
        prop_assert_eq!(standard.host(), host);
        // Runs are maximal, in order, and say what the masks say.
        let (mut seen, mut end, mut last) = ((0u32, 0u32), 0, None);
        for (first, count, has_data) in state.runs() {
            prop_assert!(count > 0 && first >= end && first + count <= SUBCLUSTERS);
            prop_assert!(first > end || last != Some(has_data));
            let mask = u32::try_from(((1u64 << count) - 1) << first).unwrap();
            if has_data { seen.0 |= mask } else { seen.1 |= mask }
            (end, last) = (first + count, Some(has_data));
        }
        prop_assert_eq!(seen, (state.allocated, state.zero));
    }

    #[test]
    fn no_number_makes_a_decoder_panic(size in any_size(), a: u64, b: u64) {
        let _ = L1Entry::decode(a, size);
        let _ = RefcountTableEntry::decode(a, size);
        let _ = BitmapTableEntry::decode(a, size);
        if let Ok((entry, Some(mixed))) = Subclusters::decode(a, b, size) {
            prop_assert_eq!(mixed.encode(entry.host()), (a, b));
        }
        for version in [Version::V2, Version::V3] {
            if let Ok(entry) = L2Entry::decode(a, size, version) {
                prop_assert_eq!(L2Entry::decode(entry.encode(), size, Version::V3), Ok(entry));
            }
        }
    }

    /// The descriptor, put together by the specification's formula: offset in x bits, then sectors less one.
    #[test]
    fn descriptors(size in any_size(), seed: u64, sectors in 1..8192u64) {
        let x = 62 - (size.bits() - 8);
        let (offset, most) = (seed % (1 << x), 1u64 << (size.bits() - 8));
        let sectors = 1 + (sectors - 1) % most;
        let range = CompressedRange::decode((sectors - 1) << x | offset, size);
        prop_assert_eq!(range.offset, HostOffset(offset));
        prop_assert_eq!(range.end(), offset / 512 * 512 + sectors * 512);
        prop_assert_eq!(range.length, range.end() - offset);
        prop_assert!(range.last_sector().0 >= offset && range.end() - range.last_sector().0 <= 512);
        let clusters: Vec<u64> = range.host_clusters(size).map(|cluster| cluster.0).collect();
        let expected: Vec<u64> = (offset >> size.bits()..=(range.end() - 1) >> size.bits()).collect();
        prop_assert_eq!(clusters, expected);
        // The two topmost bits are those of the entry.
        prop_assert_eq!(CompressedRange::decode(3 << 62 | (sectors - 1) << x | offset, size), range);
    }
}
