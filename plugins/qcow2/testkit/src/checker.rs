//! Reads and checks qcow2 images, straight from the specification and without regard for speed.

use super::bitmaps::{bitmaps, extension};
pub use super::view::View;
use super::view::OFFSET;
use super::{be32, be64};
use instar_testkit::{copy_padded, padded};
use std::collections::BTreeMap;

/// Where the entries of the snapshot table stand, and where it ends.
fn snapshot_entries(bytes: &[u8]) -> (Vec<usize>, usize) {
    let (mut at, mut found) = (be64(bytes, 64) as usize, Vec::new());
    for _ in 0..be32(bytes, 60) {
        found.push(at);
        let names = usize::from(bytes[at + 13]) + usize::from(bytes[at + 15]);
        at += (40 + be32(bytes, at + 36) as usize + names).next_multiple_of(8);
    }
    (found, at)
}

/// L1 table and number of its entries of every snapshot, and the length of the snapshot table.
pub fn snapshots(bytes: &[u8]) -> (Vec<(u64, u64)>, u64) {
    let (entries, end) = snapshot_entries(bytes);
    let found = entries.into_iter().map(|at| (be64(bytes, at), u64::from(be32(bytes, at + 8)))).collect();
    (found, end as u64 - be64(bytes, 64))
}

/// Virtual sizes that the snapshots record: extra data, bytes 8 to 15.
pub fn snapshot_sizes(bytes: &[u8]) -> Vec<u64> {
    snapshot_entries(bytes).0.into_iter().map(|at| be64(bytes, at + 48)).collect()
}

/// What each snapshot reads as, over what lies below the image.
pub fn snapshot_contents(bytes: &[u8], below: Option<&[u8]>) -> Vec<Vec<u8>> {
    let all = snapshots(bytes).0.into_iter().zip(snapshot_sizes(bytes));
    all.map(|((l1, entries), virtual_size)| {
        let view = View { virtual_size, ..View::new(bytes) };
        content_of(&view, view.entries_of(l1, entries), below)
    })
    .collect()
}

/// Decode a deflate stream that gives `length` bytes; what follows it does not matter.
fn inflate(stream: &[u8], length: usize) -> Vec<u8> {
    use miniz_oxide::inflate::stream::{inflate, InflateState};
    let mut output = vec![0; length];
    let mut state = InflateState::new_boxed(miniz_oxide::DataFormat::Raw);
    let result = inflate(&mut state, stream, &mut output, miniz_oxide::MZFlush::None);
    result.status.unwrap();
    assert_eq!(result.bytes_written, length, "a short compressed cluster");
    output
}

/// Guest-visible bytes of an image over what lies below it.
pub fn content(bytes: &[u8], below: Option<&[u8]>) -> Vec<u8> {
    let view = View::new(bytes);
    content_of(&view, view.entries(), below)
}

/// Guest-visible bytes of an image with this data file over what lies below it.
pub fn content_outside(bytes: &[u8], data: &[u8], below: Option<&[u8]>) -> Vec<u8> {
    let view = View { data: Some(data), ..View::new(bytes) };
    content_of(&view, view.entries(), below)
}

fn content_of(view: &View<'_>, entries: Vec<(u64, u64, u64)>, below: Option<&[u8]>) -> Vec<u8> {
    let bytes = view.bytes;
    let mut disk = padded(below.unwrap_or_default(), view.virtual_size as usize);
    for (guest, entry, bitmap) in entries {
        let start = (guest << view.bits) as usize;
        if start >= disk.len() {
            continue;
        }
        let length = (view.size as usize).min(disk.len() - start);
        if entry & (1 << 62) != 0 {
            let (first, end) = view.compressed(entry);
            let stream = &bytes[first as usize..bytes.len().min(end as usize)];
            let cluster = inflate(stream, view.size as usize);
            disk[start..start + length].copy_from_slice(&cluster[..length]);
            continue;
        }
        let host = (entry & OFFSET) as usize;
        let subcluster_size = view.size as usize / 32;
        for (subcluster, part) in disk[start..start + length].chunks_mut(subcluster_size).enumerate() {
            if bitmap >> (32 + subcluster) & 1 != 0 {
                part.fill(0);
            } else if bitmap >> subcluster & 1 != 0 {
                let held = view.data.unwrap_or(bytes);
                copy_padded(part, held.get(host + subcluster * subcluster_size..).unwrap_or_default());
            }
        }
    }
    disk
}

/// What is wrong with an image.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Corruptions, in words.
    pub errors: Vec<String>,
    /// Clusters whose refcount is too high.
    pub leaks: u64,
}

/// Whether an extended entry contradicts itself.
fn is_wrong(entry: u64, bitmap: u64) -> bool {
    if entry & (1 << 62) != 0 {
        return bitmap != 0;
    }
    let (zero, allocated) = (bitmap >> 32, bitmap & 0xffff_ffff);
    zero & allocated != 0 || (entry & (OFFSET | 1 << 63) == 0 && allocated != 0) || entry & 1 != 0
}

/// What `qemu-img check` would say: references against refcounts, COPIED flags, bounds, alignment.
pub fn check(bytes: &[u8]) -> Report {
    let view = View::new(bytes);
    let mut report = Report::default();
    let mut references: BTreeMap<u64, u64> = BTreeMap::new();
    let mut refer = |offset: u64, bytes: u64, report: &mut Report, what: &str| {
        if !offset.is_multiple_of(view.size) {
            report.errors.push(format!("{what} unaligned at {offset}"));
        }
        if bytes > 64 << 20 {
            report.errors.push(format!("{what} of {bytes} bytes"));
            return;
        }
        for cluster in offset >> view.bits..(offset + bytes).div_ceil(view.size) {
            *references.entry(cluster).or_default() += 1;
        }
    };
    refer(0, 1, &mut report, "header");
    let table = be64(bytes, 48);
    let table_length = u64::from(be32(bytes, 56)) << view.bits;
    refer(table, table_length, &mut report, "refcount table");
    refer(be64(bytes, 40), u64::from(be32(bytes, 36)) * 8, &mut report, "L1 table");
    for index in 0..table_length / 8 {
        let block = view.entry(table + index * 8);
        if block != 0 {
            refer(block, view.size, &mut report, "refcount block");
        }
    }
    let l1 = be64(bytes, 40);
    for index in 0..u64::from(be32(bytes, 36)) {
        let entry = view.entry(l1 + index * 8);
        if entry & OFFSET != 0 {
            refer(entry & OFFSET, view.size, &mut report, "L2 table");
            if (entry >> 63 == 1) != (view.refcount((entry & OFFSET) >> view.bits) == 1) {
                report.errors.push(format!("COPIED flag of L1 entry {index}"));
            }
        }
    }
    for (guest, entry, bitmap) in view.entries() {
        let host = entry & OFFSET;
        if view.extended() && is_wrong(entry, bitmap) {
            report.errors.push(format!("the bitmap {bitmap:x} of guest cluster {guest}"));
        }
        if entry & (1 << 62) != 0 {
            let (first, end) = view.compressed(entry);
            for cluster in first >> view.bits..end.div_ceil(view.size) {
                refer(cluster << view.bits, 1, &mut report, "compressed");
            }
            if entry >> 63 == 1 || end - 512 >= bytes.len() as u64 {
                report.errors.push(format!("compressed guest cluster {guest}"));
            }
        } else if view.outside() {
            let is_host = host != 0 || entry >> 63 == 1;
            if is_host && (host != guest << view.bits || entry >> 63 == 0) {
                report.errors.push(format!("guest cluster {guest} in the data file"));
            }
        } else if host != 0 {
            refer(host, view.size, &mut report, "data");
            if (entry >> 63 == 1) != (view.refcount(host >> view.bits) == 1) {
                report.errors.push(format!("COPIED flag of guest cluster {guest}"));
            }
            if host >= bytes.len() as u64 {
                report.errors.push(format!("guest cluster {guest} beyond the end of the file"));
            }
        }
    }
    let (all, table_bytes) = snapshots(bytes);
    if !all.is_empty() {
        refer(be64(bytes, 64), table_bytes, &mut report, "snapshot table");
    }
    if be32(bytes, 4) == 3 && snapshot_entries(bytes).0.iter().any(|at| be32(bytes, at + 36) < 16) {
        report.errors.push("a snapshot without its virtual size".to_owned());
    }
    for (l1, l1_entries) in all {
        refer(l1, l1_entries * 8, &mut report, "snapshot L1 table");
        for index in 0..l1_entries {
            let table = view.entry(l1 + index * 8) & OFFSET;
            if table != 0 {
                refer(table, view.size, &mut report, "snapshot L2 table");
            }
        }
        for (guest, entry, bitmap) in view.entries_of(l1, l1_entries) {
            if view.extended() && is_wrong(entry, bitmap) {
                report.errors.push(format!("the bitmap {bitmap:x} of guest cluster {guest} in a snapshot"));
            }
            if entry & (1 << 62) != 0 {
                let (first, end) = view.compressed(entry);
                for cluster in first >> view.bits..end.div_ceil(view.size) {
                    refer(cluster << view.bits, 1, &mut report, "snapshot compressed");
                }
            } else if entry & OFFSET != 0 {
                refer(entry & OFFSET, view.size, &mut report, "snapshot data");
            }
        }
    }
    let all = bitmaps(bytes);
    if let Some(at) = extension(bytes).filter(|_| !all.is_empty()) {
        refer(be64(bytes, at + 16), be64(bytes, at + 8), &mut report, "bitmap directory");
    }
    for bitmap in all {
        refer(bitmap.table, bitmap.entries * 8, &mut report, "bitmap table");
        for cluster in bitmap.clusters {
            refer(cluster, view.size, &mut report, "bitmap data");
            if cluster >= bytes.len() as u64 {
                report.errors.push(format!("bitmap data beyond the end of the file at {cluster}"));
            }
        }
    }
    for (&cluster, &count) in &references {
        let stored = view.refcount(cluster);
        if stored < count {
            report.errors.push(format!("cluster {cluster}: refcount {stored}, {count} references"));
        }
    }
    for cluster in 0..(bytes.len() as u64).div_ceil(view.size) {
        let count = references.get(&cluster).copied().unwrap_or(0);
        report.leaks += u64::from(view.refcount(cluster) > count);
    }
    report
}
