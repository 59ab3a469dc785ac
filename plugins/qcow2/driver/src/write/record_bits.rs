//! Recording what a commit changes in the enabled bitmaps of the backing.
//!
//! A bitmap may claim more than has changed, never less. So the bits of a window are set *before* its data is written,
//! and nothing else about a bitmap changes: it is valid at every instant, the `in_use` flag is never needed, and after
//! a crash the bits say more than happened, until the commit is run again, which sets the same bits. (QEMU sets
//! `in_use` while an image is open, and a crash makes the bitmap useless.) The order, and the crash that each step
//! survives:
//!
//! 1. Where a table says that all bits of a cluster are 0: the bits in a new cluster, which is
//!    [published](crate::refcount::publish): *durable*. Nothing refers to the cluster: a crash leaves leaks.
//! 2. Table entries of new clusters, and bits in clusters that are there, *then a flush*. Each entry refers to a
//!    durable cluster with refcount 1; each bit is right by itself, whichever of them are durable.
//!
//! Only then comes the data. Where all bits of a cluster are 1 there is nothing to do. Memory is bounded by
//! [`BATCH`], whatever the size of the disk and the number of bitmaps.

use crate::image::{overflow, Image};
use crate::write::backing::Backing;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::enabled_bitmaps::{EnabledBitmaps, Recorded};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{BitmapTableEntry, ClusterSize, HostCluster, HostOffset};

/// Slices of bitmap data that are worked on at once: each may need another slice of a table, so 8 MiB.
const BATCH: usize = 1024;

/// Bits to set within one slice of bitmap data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BitRange {
    /// Index of the bitmap.
    bitmap: usize,
    /// Byte offset in the file of the table entry of the cluster that has the slice.
    at: u64,
    /// Byte offset of the slice within that cluster.
    slice: u64,
    /// First and last bit within the slice.
    first: u64,
    last: u64,
    /// Index of the table entry.
    entry: u64,
    /// Whether the table has that entry already.
    held: bool,
}

/// Guest byte ranges (start, end) of extents, those that follow each other merged.
fn guest_ranges(extents: &[ClusterExtent], cluster_bits: u32) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for extent in extents.iter().filter(|extent| extent.length != 0) {
        let start = (extent.cluster.0 << cluster_bits) + extent.start;
        let end = start + extent.length;
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

/// The bits of a bitmap that guest byte ranges touch, slice by slice, ascending.
fn bit_ranges<'a>(
    (number, bitmap): (usize, &Recorded),
    ranges: &'a [(u64, u64)],
    slice_bytes: u64,
    cluster_bytes: u64,
) -> impl Iterator<Item = BitRange> + use<'a> {
    let bitmap = *bitmap;
    let (slice_bits, per_cluster) = (slice_bytes * 8, cluster_bytes / slice_bytes);
    ranges.iter().flat_map(move |&(start, end)| {
        let (from, to) = (start >> bitmap.granularity_bits, (end - 1) >> bitmap.granularity_bits);
        (from / slice_bits..=to / slice_bits).map(move |slice| {
            let entry = slice / per_cluster;
            BitRange {
                bitmap: number,
                at: bitmap.table.0 + entry * 8,
                slice: slice % per_cluster * slice_bytes,
                first: if slice == from / slice_bits { from % slice_bits } else { 0 },
                last: if slice == to / slice_bits { to % slice_bits } else { slice_bits - 1 },
                entry,
                held: entry < bitmap.held,
            }
        })
    })
}

/// What is done with a batch of bits.
type OnBatch<'a> = &'a mut dyn FnMut(&mut EnabledBitmaps, &mut dyn BlockIo, &[BitRange]) -> DriverResult<()>;

impl EnabledBitmaps {
    /// Call `each` with the bits of all bitmaps that guest byte ranges touch, in batches across bitmaps, so that many small ones
    /// share their flushes. The table entries are loaded.
    fn each_batch(
        &mut self,
        io: &mut dyn BlockIo,
        size: ClusterSize,
        ranges: &[(u64, u64)],
        each: OnBatch<'_>,
    ) -> DriverResult<()> {
        let slice_bytes = self.tables.slice_size() as u64;
        let bitmaps = core::mem::take(&mut self.recorded);
        let numbered = bitmaps.iter().enumerate();
        let mut all = numbered.flat_map(|bitmap| bit_ranges(bitmap, ranges, slice_bytes, size.bytes()));
        let result = loop {
            let batch: Vec<BitRange> = all.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break Ok(());
            }
            if batch.iter().any(|bits| bitmaps.get(bits.bitmap).is_none_or(|bitmap| bits.entry >= bitmap.entries)) {
                break Err(overflow("an entry of a bitmap table"));
            }
            self.tables.shrink(BATCH);
            let loaded = self.tables.load(io, batch.iter().filter(|bits| bits.held).map(|bits| bits.at));
            if let Err(error) = loaded.and_then(|()| each(self, io, &batch)) {
                break Err(error);
            }
        };
        drop(all);
        self.recorded = bitmaps;
        self.tables.shrink(BATCH / 16);
        result
    }

    fn entry(&self, image: &Image, bits: &BitRange) -> DriverResult<BitmapTableEntry> {
        if !bits.held {
            return Ok(BitmapTableEntry::Zeroes);
        }
        BitmapTableEntry::decode(self.tables.entry(bits.at)?, image.cluster_size())
            .map_err(|error| image.corrupt(bits.at, format!("an entry of a bitmap table {error}")))
    }

    /// Count the clusters that the bitmaps will need for these extents.
    ///
    /// # Errors
    /// Corruption of a bitmap table; I/O errors.
    pub(crate) fn plan(&mut self, io: &mut dyn BlockIo, image: &Image, extents: &[ClusterExtent]) -> DriverResult<u64> {
        if self.is_empty() {
            return Ok(0);
        }
        self.plan_ranges(io, image, &guest_ranges(extents, image.cluster_size().bits()))
    }

    /// Count the clusters that the bitmaps will need for these guest byte ranges, ascending over all calls.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub(crate) fn plan_ranges(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        ranges: &[(u64, u64)],
    ) -> DriverResult<u64> {
        let mut needed = 0;
        self.each_batch(io, image.cluster_size(), ranges, &mut |bitmaps, _, batch| {
            for bits in batch {
                let last = bitmaps.last_planned.get_mut(bits.bitmap);
                if last.ok_or_else(|| overflow("the index of a bitmap"))?.replace(bits.entry) != Some(bits.entry) {
                    needed += u64::from(bitmaps.entry(image, bits)? == BitmapTableEntry::Zeroes);
                }
            }
            Ok(())
        })?;
        Ok(needed)
    }

    /// Set the bits of these extents, durably.
    ///
    /// # Errors
    /// Corruption of a bitmap table; I/O errors.
    pub(crate) fn record(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        extents: &[ClusterExtent],
    ) -> DriverResult<()> {
        if self.is_empty() {
            return Ok(());
        }
        let ranges = guest_ranges(extents, backing.image.cluster_size().bits());
        self.record_ranges(io, backing, &ranges)
    }

    /// Set the bits of these guest byte ranges, durably.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub(crate) fn record_ranges(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        ranges: &[(u64, u64)],
    ) -> DriverResult<()> {
        let size = backing.image.cluster_size();
        self.each_batch(io, size, ranges, &mut |bitmaps, io, batch| bitmaps.record_batch(io, backing, batch))?;
        backing.flush(io)
    }

    fn record_batch(&mut self, io: &mut dyn BlockIo, backing: &mut Backing, batch: &[BitRange]) -> DriverResult<()> {
        let mut there: Vec<(u64, BitRange)> = Vec::new();
        let mut fresh: Vec<BitRange> = Vec::new();
        for bits in batch {
            match self.entry(&backing.image, bits)? {
                BitmapTableEntry::Ones => {}
                BitmapTableEntry::Data(cluster) => there.push((cluster.0 + bits.slice, *bits)),
                BitmapTableEntry::Zeroes => fresh.push(*bits),
            }
        }
        self.data.clear();
        let made = self.make_clusters(io, backing, &fresh)?;
        self.data.clear();
        self.data.load(io, there.iter().map(|&(slice, _)| slice))?;
        for (slice, bits) in there {
            self.data.set_bits(slice, bits.first, bits.last)?;
        }
        if !made.is_empty() {
            backing.space.referenced();
        }
        for (at, cluster) in made {
            self.tables.set_entry(at, BitmapTableEntry::Data(cluster).encode())?;
        }
        // A window that sets no new bit costs no flush.
        if self.data.is_dirty() || self.tables.is_dirty() {
            backing.out.written();
        }
        self.data.write_dirty(io)?;
        self.data.clear();
        self.tables.write_dirty(io)
    }

    /// Step 1. Returns which table entry is to refer to which cluster.
    fn make_clusters(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        fresh: &[BitRange],
    ) -> DriverResult<BTreeMap<u64, HostOffset>> {
        let mut made: BTreeMap<u64, HostOffset> = fresh.iter().map(|bits| (bits.at, HostOffset(0))).collect();
        if made.is_empty() {
            return Ok(made);
        }
        let mut reserved = backing.reserve(io, made.len() as u64)?;
        let stale: Vec<HostCluster> = reserved.stale().map(|(_, cluster)| cluster).collect();
        backing.zero_clusters(io, &stale)?;
        for place in made.values_mut() {
            *place = backing.image.host_offset(reserved.next()?)?;
        }
        for bits in fresh {
            let cluster = made.get(&bits.at).filter(|cluster| cluster.0 != 0);
            let slice = cluster.ok_or_else(|| overflow("the number of clusters to allocate"))?.0 + bits.slice;
            self.data.insert_zeroed(slice);
            self.data.set_bits(slice, bits.first, bits.last)?;
        }
        self.data.write_dirty(io)?;
        backing.out.written();
        backing.publish(io)?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_guest_sdk::Content;
    use instar_qcow2_format::GuestCluster;

    fn piece(cluster: u64, start: u64, length: u64) -> ClusterExtent {
        ClusterExtent { cluster: GuestCluster(cluster), start, length, content: Content::Zero }
    }

    #[test]
    fn pieces_that_follow_each_other_are_one_range() {
        let pieces = [piece(0, 512, 3584), piece(1, 0, 4096), piece(2, 512, 512), piece(2, 1024, 512), piece(9, 0, 0)];
        assert_eq!(guest_ranges(&pieces, 12), [(512, 8192), (8704, 9728)]);
    }

    #[test]
    fn bits_of_ranges_slice_by_slice() {
        let bitmap = Recorded { table: HostOffset(8192), entries: 9, held: 9, granularity_bits: 9 };
        // Slices of 512 bytes have 4096 bits, which is 2 MiB of guest; two of them are a cluster.
        let find = |ranges: &[(u64, u64)]| -> Vec<(u64, u64, u64, u64)> {
            bit_ranges((0, &bitmap), ranges, 512, 1024).map(|p| (p.at, p.slice, p.first, p.last)).collect()
        };
        assert_eq!(find(&[(0, 1)]), [(8192, 0, 0, 0)]);
        assert_eq!(find(&[(511, 513)]), [(8192, 0, 0, 1)]);
        assert_eq!(find(&[(0, 2 << 20)]), [(8192, 0, 0, 4095)]);
        let mib = 1 << 20;
        assert_eq!(find(&[(2 * mib - 1, 4 * mib + 1)]), [(8192, 0, 4095, 4095), (8192, 512, 0, 4095), (8200, 0, 0, 0)]);
    }
}
