//! Table entries and refcounts: every bit of the specification, round trips, and what is refused.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{
    get_refcount, set_refcount, ClusterSize, EntryError, GuestOffset, HostCluster, HostOffset, L1Entry, L2Entry,
    RefcountOrder, RefcountTableEntry, Version, COPIED,
};
use proptest::prelude::*;

fn size(bits: u32) -> ClusterSize {
    ClusterSize::from_bits(bits).unwrap()
}

#[test]
fn cluster_sizes() {
    assert_eq!(ClusterSize::from_bits(8), None);
    assert_eq!(ClusterSize::from_bits(22), None);
    let s = size(16);
    assert_eq!((s.bytes(), s.l2_entries(), s.l2_coverage()), (65536, 8192, 512 << 20));
    assert_eq!((s.count_for(0), s.count_for(1), s.count_for(65536), s.count_for(65537)), (0, 1, 1, 2));
    assert_eq!(s.round_up(u64::MAX), None);
    assert_eq!(s.round_up(65537), Some(131_072));
    assert_eq!(s.host_cluster(HostOffset(131_071)), HostCluster(1));
    assert_eq!(s.host_offset(HostCluster(u64::MAX)), None);
    assert_eq!(s.guest_cluster(GuestOffset(65536)).0, 1);
    assert_eq!(s.offset_in(65537), 1);
}

#[test]
fn l1_entries() {
    let s = size(16);
    assert_eq!(L1Entry::decode(0, s), Ok(L1Entry::Unallocated));
    let table = L1Entry::Table { offset: HostOffset(0x5_0000), copied: true };
    assert_eq!(L1Entry::decode(0x5_0000 | COPIED, s), Ok(table));
    assert_eq!(table.encode(), 0x5_0000 | COPIED);
    assert_eq!(L1Entry::decode(COPIED, s), Err(EntryError::OwnsNothing));
    assert_eq!(L1Entry::decode(0x5_0200, s), Err(EntryError::Unaligned(HostOffset(0x5_0200))));
    for bit in (0..9).chain(56..63) {
        assert_eq!(L1Entry::decode(0x5_0000 | 1 << bit, s), Err(EntryError::Reserved(1 << bit)));
    }
}

#[test]
fn l2_entries() {
    let s = size(12);
    let decode = |raw| L2Entry::decode(raw, s, Version::V3);
    assert_eq!(decode(0), Ok(L2Entry::Unallocated));
    assert_eq!(decode(1), Ok(L2Entry::Zero { offset: None, copied: false }));
    assert_eq!(decode(0x5001 | COPIED), Ok(L2Entry::Zero { offset: Some(HostOffset(0x5000)), copied: true }));
    assert_eq!(decode(0x5000), Ok(L2Entry::Data { offset: HostOffset(0x5000), copied: false }));
    assert_eq!(decode(1 << 62 | 0x1234_5678), Ok(L2Entry::Compressed { descriptor: 0x1234_5678 }));
    assert_eq!(decode(COPIED), Err(EntryError::OwnsNothing));
    assert_eq!(decode(0x5200), Err(EntryError::Unaligned(HostOffset(0x5200))));
    for bit in (1..9).chain(56..62) {
        assert_eq!(decode(0x5000 | 1 << bit), Err(EntryError::Reserved(1 << bit)));
    }
    // Version 2 has no zero flag.
    assert_eq!(L2Entry::decode(1, s, Version::V2), Err(EntryError::Reserved(1)));
}

#[test]
fn refcount_table_entries() {
    let s = size(9);
    assert_eq!(RefcountTableEntry::decode(0, s), Ok(RefcountTableEntry::Unallocated));
    assert_eq!(RefcountTableEntry::decode(0x600, s), Ok(RefcountTableEntry::Block(HostOffset(0x600))));
    for bit in 0..9 {
        assert_eq!(RefcountTableEntry::decode(0x600 | 1 << bit, s), Err(EntryError::Reserved(1 << bit)));
    }
    assert!(matches!(RefcountTableEntry::decode(0x600, size(16)), Err(EntryError::Unaligned(_))));
}

#[test]
fn refcount_widths() {
    assert_eq!(RefcountOrder::new(7), None);
    let expected = [(1, 1u64), (2, 3), (4, 15), (8, 255), (16, 65535), (32, u64::from(u32::MAX)), (64, u64::MAX)];
    for (order, (bits, max)) in (0..).zip(expected) {
        let order = RefcountOrder::new(order).unwrap();
        assert_eq!((order.bits(), order.max()), (bits, max));
        assert_eq!(order.entries_in(512), 4096 / u64::from(bits));
        assert_eq!(
            order.locate(size(9), HostCluster(10_000)),
            (10_000 / (4096 / u64::from(bits)), 10_000 % (4096 / u64::from(bits)))
        );
    }
}

#[test]
fn narrow_refcounts_start_at_the_least_significant_bit() {
    let mut block = [0u8; 2];
    set_refcount(&mut block, RefcountOrder::new(0).unwrap(), 0, 1).unwrap();
    set_refcount(&mut block, RefcountOrder::new(0).unwrap(), 9, 1).unwrap();
    assert_eq!(block, [1, 2]);
    let mut block = [0u8; 1];
    set_refcount(&mut block, RefcountOrder::new(1).unwrap(), 3, 2).unwrap();
    assert_eq!(block, [0x80]);
    let mut block = [0u8; 4];
    set_refcount(&mut block, RefcountOrder::BITS_16, 1, 0x1234).unwrap();
    assert_eq!(block, [0, 0, 0x12, 0x34]);
}

proptest! {
    #[test]
    fn refcounts_keep_their_neighbours(
        order in 0..7u32,
        mut block in prop::collection::vec(any::<u8>(), 64),
        index in 0..600usize,
        value in any::<u64>(),
    ) {
        let order = RefcountOrder::new(order).unwrap();
        let count = usize::try_from(order.entries_in(64)).unwrap();
        let before: Vec<_> = (0..count).map(|i| get_refcount(&block, order, i).unwrap()).collect();
        let done = set_refcount(&mut block, order, index, value);
        prop_assert_eq!(done.is_some(), index < count && value <= order.max());
        for (i, &old) in before.iter().enumerate() {
            let now = get_refcount(&block, order, i).unwrap();
            prop_assert_eq!(now, if done.is_some() && i == index { value } else { old });
        }
        prop_assert_eq!(get_refcount(&block, order, count), None);
    }

    #[test]
    fn decoded_entries_encode_to_themselves(raw in any::<u64>(), bits in 9..22u32) {
        let s = size(bits);
        if let Ok(entry) = L1Entry::decode(raw, s) {
            if entry != L1Entry::Unallocated {
                prop_assert_eq!(entry.encode(), raw);
            }
        }
        // Without the bits that most random numbers trip over.
        for raw in [raw, raw & (COPIED | 0x00ff_ffff_ffe0_0001)] {
            if let Ok(entry) = L2Entry::decode(raw, s, Version::V3) {
                let kept = if matches!(entry, L2Entry::Compressed { .. }) { !COPIED } else { u64::MAX };
                if entry != L2Entry::Unallocated {
                    prop_assert_eq!(entry.encode(), raw & kept);
                }
            }
        }
    }
}
