//! Damage that the dirty bit stands for, done to the bytes of an image.

use super::view::View;
use super::{be32, be64};
use instar_guest_sdk::random::Random;

/// The bits of an L1 or L2 entry that hold a byte offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Write a big-endian number of 64 bits at byte `at`.
pub fn put64(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// Say that the image was not closed cleanly.
pub fn set_dirty(bytes: &mut [u8]) {
    let features = be64(bytes, 72) | 1;
    put64(bytes, 72, features);
}

/// Set the refcount of a cluster that has a block.
pub fn set_refcount(bytes: &mut [u8], cluster: u64, value: u64) {
    let (size, order) = (1u64 << be32(bytes, 20), View::new(bytes).refcount_order());
    let per_block = (size * 8) >> order;
    let block = be64(bytes, (be64(bytes, 48) + cluster / per_block * 8) as usize) as usize;
    let (bits, index) = (1usize << order, (cluster % per_block) as usize);
    if bits < 8 {
        let (at, shift) = (block + index * bits / 8, index * bits % 8);
        let mask = ((1u8 << bits) - 1) << shift;
        bytes[at] = bytes[at] & !mask | (value as u8) << shift & mask;
        return;
    }
    let width = bits / 8;
    bytes[block + index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// Set the dirty bit, then anything for refcounts and COPIED flags: what is described may have any refcount.
pub fn spoil(bytes: &mut [u8], seed: u64) {
    let mut random = Random::seeded(seed);
    set_dirty(bytes);
    let (size, order) = (1u64 << be32(bytes, 20), View::new(bytes).refcount_order());
    let per_block = (size * 8) >> order;
    let largest = u64::MAX >> (64 - (1 << order));
    let table = be64(bytes, 48);
    for index in 0..(u64::from(be32(bytes, 56)) * size / 8) {
        if be64(bytes, (table + index * 8) as usize) == 0 {
            continue;
        }
        for cluster in index * per_block..((index + 1) * per_block).min(index * per_block + 4096) {
            let value = *random.pick(&[0, 0, 1, 2, 3, largest]).min(&largest);
            set_refcount(bytes, cluster, value);
        }
    }
    let l1 = be64(bytes, 40);
    for index in 0..u64::from(be32(bytes, 36)) {
        flip(bytes, l1 + index * 8, &mut random);
        let table = be64(bytes, (l1 + index * 8) as usize) & OFFSET;
        for i in 0..size / 8 {
            if table != 0 {
                flip(bytes, table + i * 8, &mut random);
            }
        }
    }
}

/// COPIED, or not, for an entry that may have it.
pub fn flip(bytes: &mut [u8], at: u64, random: &mut Random) {
    let entry = be64(bytes, at as usize);
    if entry & OFFSET != 0 && entry & (1 << 62) == 0 && random.below(3) == 0 {
        put64(bytes, at, entry ^ (1 << 63));
    }
}

/// Drop the refcount blocks with these indices from the table.
pub fn drop_blocks(bytes: &mut [u8], indices: &[u64]) {
    set_dirty(bytes);
    let table = be64(bytes, 48);
    indices.iter().for_each(|index| put64(bytes, table + index * 8, 0));
}

/// Give an image a bitmap, in three clusters that were leaks until now: the first of them is `first`.
pub fn add_bitmap(bytes: &mut [u8], first: u64) {
    let size = 1u64 << be32(bytes, 20);
    let at = |n: u64| (first + n) * size;
    bytes[104..112].copy_from_slice(&[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]);
    bytes[112..120].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0]);
    put64(bytes, 120, 32);
    put64(bytes, 128, at(0));
    put64(bytes, 88, 1);
    // One table entry; type 1, granularity 64 KiB, a name of one letter.
    put64(bytes, at(0), at(1));
    put64(bytes, at(0) + 8, 1 << 32);
    put64(bytes, at(0) + 16, 0x0110_0001 << 32);
    bytes[at(0) as usize + 24] = b'b';
    put64(bytes, at(1), at(2));
}
