//! Refcount blocks of all seven widths: bit order, and every value in its place.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{get_refcount, set_refcount, ClusterSize, HostCluster, RefcountOrder};

fn orders() -> impl Iterator<Item = RefcountOrder> {
    (0..=6).map(|order| RefcountOrder::new(order).unwrap())
}

/// Where the bits of a refcount are, from the specification's words: in widths below a byte, entry 0 is in the least
/// significant bits; from a byte on, the most significant byte comes first.
fn reference(block: &[u8], bits: usize, index: usize) -> u64 {
    (0..bits).fold(0, |value, bit| {
        let (byte, shift) = if bits < 8 {
            (index * bits / 8, index * bits % 8 + bit)
        } else {
            ((index + 1) * bits / 8 - 1 - bit / 8, bit % 8)
        };
        value | u64::from(block[byte] >> shift & 1) << bit
    })
}

#[test]
fn one_bit_at_a_time() {
    for order in orders() {
        let bits = order.bits() as usize;
        let count = 64 * 8 / bits;
        for position in 0..64 * 8 {
            let mut block = [0u8; 64];
            block[position / 8] = 1 << (position % 8);
            let mut found = 0;
            for index in 0..count {
                let value = get_refcount(&block, order, index).unwrap();
                assert_eq!(value, reference(&block, bits, index), "{bits} bits, entry {index}, bit {position}");
                found += value.count_ones();
                // Written where it was read.
                let mut copy = [0u8; 64];
                set_refcount(&mut copy, order, index, value).unwrap();
                assert_eq!(copy, if value == 0 { [0; 64] } else { block });
            }
            assert_eq!(found, 1);
        }
    }
}

#[test]
fn bytes_of_each_width() {
    let cases: [(u32, usize, u64, &[u8]); 7] = [
        (0, 5, 1, &[0x20]),
        (1, 2, 3, &[0x30]),
        (2, 1, 0xa, &[0xa0]),
        (3, 1, 0xab, &[0, 0xab]),
        (4, 0, 0xabcd, &[0xab, 0xcd]),
        (5, 0, 0x0102_0304, &[1, 2, 3, 4]),
        (6, 0, 0x0102_0304_0506_0708, &[1, 2, 3, 4, 5, 6, 7, 8]),
    ];
    for (order, index, value, expected) in cases {
        let order = RefcountOrder::new(order).unwrap();
        let mut block = vec![0; expected.len()];
        set_refcount(&mut block, order, index, value).unwrap();
        assert_eq!(block, expected);
        assert_eq!(get_refcount(&block, order, index), Some(value));
    }
}

#[test]
fn bounds_of_index_and_value() {
    for order in orders() {
        let mut block = [0x5a; 16];
        let count = usize::try_from(order.entries_in(16)).unwrap();
        for index in [count, count + 1, usize::MAX / 8, usize::MAX] {
            assert_eq!(get_refcount(&block, order, index), None);
            assert_eq!(set_refcount(&mut block, order, index, 0), None);
        }
        if let Some(more) = order.max().checked_add(1) {
            assert_eq!(set_refcount(&mut block, order, 0, more), None);
        }
        assert_eq!(block, [0x5a; 16]);
        assert_eq!(get_refcount(&[], order, 0), None);
        assert_eq!(set_refcount(&mut block, order, count - 1, order.max()), Some(()));
        assert_eq!(get_refcount(&block, order, count - 1), Some(order.max()));
    }
}

#[test]
fn geometry() {
    for order in orders() {
        for bits in 9..=21 {
            let size = ClusterSize::from_bits(bits).unwrap();
            let per_block = order.entries_in(size.bytes());
            assert_eq!(per_block, size.bytes() * 8 / u64::from(order.bits()));
            for (cluster, expected) in
                [(0, (0, 0)), (per_block - 1, (0, per_block - 1)), (per_block, (1, 0)), (3 * per_block + 7, (3, 7))]
            {
                assert_eq!(order.locate(size, HostCluster(cluster)), expected);
            }
            let (block, index) = order.locate(size, HostCluster(u64::MAX));
            assert_eq!(u128::from(block) * u128::from(per_block) + u128::from(index), u128::from(u64::MAX));
        }
    }
}
