//! What images are made of, and which of them can be compared.

use crate::checker::{check, snapshot_sizes, snapshots};
use crate::damage::OFFSET;
use crate::pair::is_dirty;
use crate::{be32, be64};
use instar_testkit::{ByteOrder, Field, Layout};

/// COPIED, compressed, zero, and what is reserved.
const FLAGS: &[u64] = &[1 << 63, 1 << 62, 1, 1 << 63, 1 << 57, 2, 512, 1 << 56, 1 << 63];

fn table(bytes: &[u8], at: usize, entries: usize) -> Vec<usize> {
    let entry = |index: usize| be64(bytes, at + index * 8) & OFFSET;
    (0..entries).map(entry).filter(|&entry| entry != 0).map(|entry| entry as usize).collect()
}

/// The fields of a valid image.
pub fn layout(bytes: &[u8]) -> Layout {
    let mut layout = Layout::new(ByteOrder::Big, 1, FLAGS);
    let size = 1usize << be32(bytes, 20);
    let (l1, l1_entries) = (be64(bytes, 40) as usize, be32(bytes, 36) as usize);
    let refcounts = be64(bytes, 48) as usize;
    // The header, its numbers once as they are and once in halves; extensions and whatever follows them.
    layout.fields(8, 104, 8);
    layout.fields(0, 104, 4);
    layout.fields(104, 200, 4);
    layout.fields(l1, l1 + (l1_entries + 1) * 8, 8);
    layout.fields(refcounts, refcounts + 64.min(size), 8);
    let blocks = table(bytes, refcounts, size / 8);
    for &block in &blocks {
        layout.fields(block, block + size.min(256), 1 + usize::from(size > 512));
    }
    let tables = table(bytes, l1, l1_entries);
    for &l2 in tables.iter().take(3) {
        // Where something is, more often than where nothing is.
        let used = (l2..l2 + size).step_by(8).filter(|&at| be64(bytes, at) != 0);
        layout.kind(used.map(|at| Field { at, width: 8 }));
        layout.fields(l2, l2 + size.min(1024), 8);
        // The compressed clusters' streams.
        for at in (l2..l2 + size).step_by(8) {
            let entry = be64(bytes, at);
            let start = (entry & ((1 << 40) - 1)) as usize;
            if entry >> 62 == 1 && start + 32 < bytes.len() {
                layout.fields(start, start + 32, 1);
                layout.places.push(start as u64);
            }
        }
    }
    let (all, snapshot_bytes) = snapshots(bytes);
    if !all.is_empty() {
        let at = be64(bytes, 64) as usize;
        layout.fields(at, at + snapshot_bytes as usize, 4);
        layout.places.push(at as u64);
        for &(l1, entries) in &all {
            layout.fields(l1 as usize, (l1 + entries * 8) as usize, 8);
            layout.places.push(l1);
        }
    }
    if let Some(extension) = crate::bitmaps::extension(bytes) {
        let (at, length) = (be64(bytes, extension + 16) as usize, be64(bytes, extension + 8) as usize);
        layout.fields(at, at + length, 4);
        layout.fields(at, at + length, 1);
        layout.places.push(at as u64);
        for bitmap in crate::bitmaps::bitmaps(bytes) {
            layout.fields(bitmap.table as usize, (bitmap.table + bitmap.entries * 8) as usize, 8);
            layout.places.extend(bitmap.clusters.iter().copied().chain([bitmap.table]));
        }
    }
    let end = bytes.len() as u64;
    layout.places.extend([0, l1 as u64, refcounts as u64, end, end - size as u64, end + size as u64]);
    layout.places.extend(blocks.iter().chain(&tables).map(|&at| at as u64));
    for &l2 in &tables {
        layout.places.extend(table(bytes, l2, size / 8).iter().take(8).map(|&at| at as u64));
    }
    layout
}

/// Whether the checker finds no error in an image that is not too large for it; the refcounts of one that was not closed cleanly
/// do not count.
pub fn is_sound(bytes: &[u8]) -> bool {
    let small = be64(bytes, 24) <= 4 << 20 && be32(bytes, 36) < 4096 && be32(bytes, 56) < 64 && be32(bytes, 60) < 8;
    // Entries of an L2 table, in as many tables as the L1 table can name.
    let entries = |l1_entries: u64| l1_entries << be32(bytes, 20).clamp(3, 21).saturating_sub(3);
    small
        && entries(u64::from(be32(bytes, 36))) <= 1 << 22
        && bytes.len() <= 16 << 20
        && snapshots(bytes).0.iter().all(|&(_, l1_entries)| l1_entries < 4096 && entries(l1_entries) <= 1 << 22)
        && snapshot_sizes(bytes).iter().all(|&size| size <= 4 << 20)
        && check(bytes)
            .errors
            .iter()
            .all(|error| is_dirty(bytes) && (error.contains("refcount") || error.contains("COPIED")))
}
