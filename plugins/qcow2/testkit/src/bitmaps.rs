//! Persistent bitmaps of images in memory: built and read from the specification, without the driver.

use super::header::extensions;
use super::view::View;
use super::{be32, be64};
use instar_testkit::padded;

/// `flags` of a directory entry: the bitmap was not saved.
pub const IN_USE: u32 = 1;
/// `flags` of a directory entry: the bitmap is enabled.
pub const AUTO: u32 = 2;

/// What a cluster of bitmap data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// Table entry 0.
    None,
    /// Table entry 1.
    All,
    /// A cluster with this in every byte that has bits of the disk.
    Bytes(u8),
}

/// A bitmap to be built.
#[derive(Clone, Debug)]
pub struct BitmapSpec {
    /// `flags` of the directory entry.
    pub flags: u32,
    /// Binary logarithm of the bytes of the disk that a bit stands for.
    pub granularity_bits: u32,
    /// One for each cluster of bitmap data; the last is repeated.
    pub bits: Vec<Bits>,
    /// What the directory entry holds before the name.
    pub extra_data: Vec<u8>,
}

impl BitmapSpec {
    /// A bitmap without extra data.
    pub fn new(flags: u32, granularity_bits: u32, bits: &[Bits]) -> Self {
        Self { flags, granularity_bits, bits: bits.to_vec(), extra_data: Vec::new() }
    }
}

/// A bitmap as it stands in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapView {
    /// Byte offset of the directory entry.
    pub at: usize,
    /// Bytes of the directory entry.
    pub length: usize,
    /// Byte offset of the bitmap table.
    pub table: u64,
    /// Entries of the bitmap table.
    pub entries: u64,
    /// `flags` of the directory entry.
    pub flags: u32,
    /// Bytes of the disk that a bit stands for.
    pub granularity: u64,
    /// A bit for each granule of the virtual disk.
    pub bits: Vec<bool>,
    /// Offsets of the clusters of bitmap data.
    pub clusters: Vec<u64>,
}

/// Where the data of the bitmaps extension begins.
pub fn extension(bytes: &[u8]) -> Option<usize> {
    if be32(bytes, 4) < 3 {
        return None;
    }
    extensions(bytes).into_iter().find(|(kind, ..)| *kind == 0x2385_2875).map(|(_, at, _)| at)
}

/// All bitmaps, if the autoclear bit says that they count.
pub fn bitmaps(bytes: &[u8]) -> Vec<BitmapView> {
    let view = View::new(bytes);
    let Some(extension) = extension(bytes).filter(|_| be64(bytes, 88) & 1 != 0) else { return Vec::new() };
    let mut at = be64(bytes, extension + 16) as usize;
    let mut all = Vec::new();
    for _ in 0..be32(bytes, extension) {
        let name = usize::from(bytes[at + 18]) << 8 | usize::from(bytes[at + 19]);
        let length = (24 + be32(bytes, at + 20) as usize + name).next_multiple_of(8);
        let (table, entries, granularity) = (be64(bytes, at), u64::from(be32(bytes, at + 8)), 1u64 << bytes[at + 17]);
        let mut found = BitmapView {
            at,
            length,
            table,
            entries,
            flags: be32(bytes, at + 12),
            granularity,
            bits: Vec::new(),
            clusters: Vec::new(),
        };
        assert!(entries <= 1 << 20, "a bitmap table of {entries} entries");
        let raw: Vec<u64> = (0..entries).map(|i| be64(bytes, (table + i * 8) as usize)).collect();
        found.clusters = raw.iter().copied().filter(|&entry| entry > 1).collect();
        for bit in 0..view.virtual_size.div_ceil(granularity) {
            // The table of one that was not saved may be too short.
            let entry = raw.get((bit / 8 / view.size) as usize).copied().unwrap_or(0);
            let byte = (entry + bit / 8 % view.size) as usize;
            found.bits.push(match entry {
                0 => false,
                1 => true,
                _ => bytes.get(byte).is_some_and(|byte| byte >> (bit % 8) & 1 == 1),
            });
        }
        all.push(found);
        at += length;
    }
    all
}

/// What must hold of the bitmaps `now` at every instant of a commit, given those `before` it and what the image reads
/// as. Returns whether every bit that is set now was set before or is among the `committed` bytes. A bitmap of an image
/// that `grows` may have been given up on the way, by what it says itself: then it is not exact.
pub fn verify_bitmaps((before, now): (&[u8], &[u8]), content: (&[u8], &[u8]), committed: &[bool], grows: bool) -> bool {
    let (old, new) = (bitmaps(before), bitmaps(now));
    assert_eq!(old.len(), new.len(), "a bitmap is gone");
    let mut exact = true;
    // What a guest of the overlay read past the end.
    let was_content = padded(content.0, content.1.len());
    for (old, new) in old.iter().zip(&new) {
        let entries = |bytes: &[u8], view: &BitmapView| bytes[view.at..view.at + view.length].to_vec();
        let (entry_before, mut entry_now) = (entries(before, old), entries(now, new));
        if grows && old.flags & IN_USE == 0 {
            entry_now[..12].copy_from_slice(&entry_before[..12]);
            if new.flags == old.flags | IN_USE {
                exact = false;
                continue;
            }
        }
        assert_eq!(entry_before, entry_now, "a directory entry changed");
        let view = View::new(now);
        let per_entry = view.size * 8;
        if old.flags & IN_USE == 0 {
            let needed = (new.bits.len() as u64).div_ceil(per_entry);
            assert_eq!(new.entries, needed, "the table is too long or too short for the disk");
        }
        // What an entry for "all bits" covers of the new part is set from the start.
        let all = |bit: usize| be64(now, (new.table + bit as u64 / per_entry * 8) as usize) == 1;
        if old.flags & (AUTO | IN_USE) != AUTO {
            let grown = |bit: usize| bit >= old.bits.len() && !all(bit);
            assert_eq!((old.flags, &old.clusters), (new.flags, &new.clusters), "a bitmap that is not kept up changed");
            assert!(new.bits.starts_with(&old.bits), "a bitmap that is not kept up changed");
            assert!((0..new.bits.len()).all(|bit| !grown(bit) || !new.bits[bit]), "a new bit is set");
            continue;
        }
        for (index, &is) in new.bits.iter().enumerate() {
            let was = old.bits.get(index).copied().unwrap_or_else(|| all(index));
            let start = index * old.granularity as usize;
            let range = start..(start + old.granularity as usize).min(content.1.len());
            let changed = was_content[range.clone()] != content.1[range.clone()];
            assert!(is || !(was || changed), "granule {index} of {} changed, and its bit is clear", old.granularity);
            let touched = committed[range.start.min(committed.len())..range.end.min(committed.len())].contains(&true);
            exact &= is == (was || touched);
        }
        let first_unused = new.bits.len() as u64;
        for bit in first_unused..new.entries * per_entry {
            let entry = be64(now, (new.table + bit / per_entry * 8) as usize);
            let byte = now.get((entry + bit / 8 % view.size) as usize).copied().unwrap_or(0);
            assert!(entry < 2 || byte >> (bit % 8) & 1 == 0, "tail bit {bit} is set");
        }
    }
    exact
}
