//! Refcounts of an image: looked up through the refcount table, changed in slices.

use crate::image::{overflow, Image};
use crate::slice_cache::SliceCache;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, Holes};
use instar_qcow2_format::{get_refcount, ClusterSize, HostCluster, HostOffset, RefcountOrder, RefcountTableEntry};

/// How many clusters a caller should handle between two calls of [`Refcounts::load`]: it bounds the slices
/// held at once to 16 MiB where every cluster has a slice of its own.
pub const CLUSTERS_PER_LOAD: usize = 4096;

/// Refcount blocks that are looked at in one go while counting.
const BLOCKS_AT_ONCE: u64 = 64;
/// Bytes of a slice that is counted, at most.
const SLICE_BYTES: u64 = 4096;
/// Slices that are read at once while counting: 1 MiB.
const SLICES_AT_ONCE: usize = 256;

/// How many refcounts with these indices of a piece of a block are not 0.
fn count_not_0(bytes: &[u8], order: RefcountOrder, wanted: &Range<u64>) -> u64 {
    // Refcounts that eight bytes hold: one at least, 64 at most.
    let per_word = order.entries_in(8);
    let words = (0u64..).zip(bytes.chunks_exact(8)).filter(|(_, word)| *word != [0; 8]);
    words
        .map(|(number, word)| {
            let first = number * per_word;
            let inside = (0usize..).zip(first..first + per_word).filter(|(_, index)| wanted.contains(index));
            inside.filter(|(index, _)| get_refcount(word, order, *index).is_some_and(|count| count != 0)).count() as u64
        })
        .sum()
}

/// The refcount table and blocks of one image.
pub struct Refcounts {
    /// Slices of the refcount table.
    pub table: SliceCache,
    /// Slices of refcount blocks.
    pub blocks: SliceCache,
    /// Where the table begins.
    pub table_offset: HostOffset,
    /// Length of the table in entries.
    pub table_entries: u64,
    order: RefcountOrder,
    cluster_size: ClusterSize,
}

impl Refcounts {
    /// The refcounts of an image; nothing is read yet.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        let size = image.slice_size();
        Self {
            table: SliceCache::new(image.device, size),
            blocks: SliceCache::new(image.device, size),
            table_offset: image.header.refcount_table,
            table_entries: image.header.refcount_table_bytes() / 8,
            order: image.header.refcount_order,
            cluster_size: image.cluster_size(),
        }
    }

    /// Width of the refcounts.
    #[must_use]
    pub fn order(&self) -> RefcountOrder {
        self.order
    }

    /// Clusters that one refcount block describes.
    #[must_use]
    pub fn per_block(&self) -> u64 {
        self.order.entries_in(self.cluster_size.bytes())
    }

    /// Which block describes a cluster, and the cluster's index in it.
    #[must_use]
    pub fn locate(&self, cluster: HostCluster) -> (u64, u64) {
        self.order.locate(self.cluster_size, cluster)
    }

    /// Byte offset in the file of a table entry.
    #[must_use]
    pub fn table_entry_at(&self, block_index: u64) -> u64 {
        self.table_offset.0.saturating_add(block_index.saturating_mul(8))
    }

    /// The refcount block with this index; its slice of the table must have been loaded.
    ///
    /// # Errors
    /// Corruption: reserved bits, an unaligned offset, or a block that is not `in_file`.
    pub fn block(
        &self,
        image: &Image,
        block_index: u64,
        in_file: impl Fn(HostOffset) -> bool,
    ) -> DriverResult<Option<HostOffset>> {
        if block_index >= self.table_entries {
            return Ok(None);
        }
        let at = self.table_entry_at(block_index);
        let entry = RefcountTableEntry::decode(self.table.entry(at)?, self.cluster_size)
            .map_err(|error| image.corrupt(at, format!("refcount table entry {block_index} {error}")))?;
        match entry {
            RefcountTableEntry::Unallocated => Ok(None),
            RefcountTableEntry::Block(offset) if in_file(offset) => Ok(Some(offset)),
            RefcountTableEntry::Block(offset) => Err(image.corrupt(
                at,
                format!("refcount table entry {block_index} points to offset {offset}, past the end of the file"),
            )),
        }
    }

    /// Load what is needed to look at these clusters, in two batches of reads.
    ///
    /// # Errors
    /// Corruption of the refcount table, and I/O errors.
    pub fn load(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        clusters: impl Iterator<Item = HostCluster> + Clone,
    ) -> DriverResult<()> {
        let (entries, base) = (self.table_entries, self.table_offset.0);
        let (order, size) = (self.order, self.cluster_size);
        let index_of = move |cluster: HostCluster| order.locate(size, cluster);
        self.table.load(
            io,
            clusters.clone().map(|c| index_of(c).0).filter(|&index| index < entries).map(|index| base + index * 8),
        )?;
        let mut offsets = Vec::new();
        for cluster in clusters {
            let (block_index, index) = index_of(cluster);
            if let Some(block) = self.block(image, block_index, |offset| image.holds_cluster(offset))? {
                offsets.push(self.blocks.locate_refcount(block.0, order, index).0);
            }
        }
        self.blocks.load(io, offsets)
    }

    /// The refcount of a cluster that was loaded; 0 where there is no block.
    ///
    /// # Errors
    /// Corruption of the refcount table.
    pub fn get(&self, image: &Image, cluster: HostCluster) -> DriverResult<u64> {
        let (block_index, index) = self.locate(cluster);
        match self.block(image, block_index, |_| true)? {
            Some(block) => self.blocks.refcount(block.0, self.order, index),
            None => Ok(0),
        }
    }

    /// Set the refcount of a cluster that was loaded and has a block.
    ///
    /// # Errors
    /// Corruption of the refcount table; a bug of the driver.
    pub fn set(&mut self, image: &Image, cluster: HostCluster, value: u64) -> DriverResult<()> {
        let (block_index, index) = self.locate(cluster);
        let block =
            self.block(image, block_index, |_| true)?.ok_or_else(|| overflow("the index of a refcount block"))?;
        self.blocks.set_refcount(block.0, self.order, index, value)
    }

    /// How many of these clusters have a refcount that is not 0. Refcount blocks in holes are not read, and zeroes are passed
    /// over eight bytes at once: an image may claim billions of clusters. Slices that are held count as they are.
    ///
    /// # Errors
    /// Corruption of the refcount table, and I/O errors.
    pub fn count_in_use(&mut self, io: &mut dyn BlockIo, image: &Image, clusters: Range<u64>) -> DriverResult<u64> {
        let per_block = self.per_block();
        let end = clusters.end.min(self.table_entries.saturating_mul(per_block));
        if clusters.start >= end {
            return Ok(0);
        }
        let (mut holes, mut count) = (Holes::default(), 0);
        let mut index = clusters.start / per_block;
        while index <= (end - 1) / per_block {
            let until = (index + BLOCKS_AT_ONCE).min((end - 1) / per_block + 1);
            self.table.shrink(CLUSTERS_PER_LOAD);
            self.blocks.shrink(CLUSTERS_PER_LOAD / 16);
            let entries: Vec<u64> = (index..until).map(|index| self.table_entry_at(index)).collect();
            self.table.load(io, entries)?;
            let mut blocks = Vec::new();
            for index in index..until {
                if let Some(block) = self.block(image, index, |offset| image.holds_cluster(offset))? {
                    let first = index * per_block;
                    blocks.push((block.0, clusters.start.max(first) - first..(end - first).min(per_block)));
                }
            }
            count += self.count_in_blocks(io, &mut holes, &blocks)?;
            index = until;
        }
        Ok(count)
    }

    /// How many refcounts with these indices of these blocks are not 0.
    fn count_in_blocks(
        &self,
        io: &mut dyn BlockIo,
        holes: &mut Holes,
        blocks: &[(u64, Range<u64>)],
    ) -> DriverResult<u64> {
        let slice = self.cluster_size.bytes().min(SLICE_BYTES);
        let per_slice = self.order.entries_in(slice);
        let device = self.blocks.device();
        let bytes = self.cluster_size.bytes();
        let ranges: Vec<_> = blocks.iter().map(|(at, _)| *at..*at + bytes).collect();
        // One block is read as quickly as it is asked for.
        let data = if blocks.len() > 1 { holes.hold_data(io, device, &ranges)? } else { vec![true; blocks.len()] };
        let held = |at: u64| self.blocks.holds(at..at + bytes);
        let mut slices = Vec::new();
        for ((block, wanted), _) in blocks.iter().zip(data).filter(|((at, _), data)| *data || held(*at)) {
            for number in wanted.start / per_slice..wanted.end.div_ceil(per_slice) {
                let first = number * per_slice;
                let inside = wanted.start.max(first) - first..(wanted.end - first).min(per_slice);
                slices.push((block + number * slice, inside));
            }
        }
        let ranges: Vec<_> = slices.iter().map(|(at, _)| *at..*at + slice).collect();
        let data = if slices.len() > 1 { holes.hold_data(io, device, &ranges)? } else { vec![true] };
        let wanted = slices.into_iter().zip(data).filter(|((at, _), data)| *data || self.blocks.bytes(*at).is_ok());
        let wanted: Vec<_> = wanted.map(|(slice, _)| slice).collect();
        let mut count = 0;
        let size = usize::try_from(slice).map_err(|_| overflow("the size of a slice"))?;
        let mut buffer = vec![0u8; size * wanted.len().min(SLICES_AT_ONCE)];
        for batch in wanted.chunks(SLICES_AT_ONCE) {
            let places = buffer.chunks_exact_mut(size).zip(batch);
            let mut requests: Vec<Request> =
                places.map(|(bytes, (at, _))| Request::read(device, *at, bytes.as_mut_ptr() as u64, slice)).collect();
            io.run(&mut requests)?;
            for (read, (at, wanted)) in buffer.chunks_exact(size).zip(batch) {
                count += count_not_0(self.blocks.bytes(*at).unwrap_or(read), self.order, wanted);
            }
        }
        Ok(count)
    }

    /// One reference less to each of these clusters (one that is named twice loses two); the space of those that have
    /// none left is given back. No flush.
    ///
    /// # Errors
    /// Corruption: a cluster that has no reference to lose; I/O errors.
    pub fn release(&mut self, io: &mut dyn BlockIo, image: &Image, mut clusters: Vec<HostCluster>) -> DriverResult<()> {
        clusters.sort_unstable();
        let bytes = self.cluster_size.bytes();
        for batch in clusters.chunks(CLUSTERS_PER_LOAD) {
            self.table.shrink(CLUSTERS_PER_LOAD);
            self.blocks.shrink(CLUSTERS_PER_LOAD / 16);
            self.load(io, image, batch.iter().copied())?;
            let mut discards: Vec<Request> = Vec::new();
            for &cluster in batch {
                let offset = self.cluster_size.host_offset(cluster).ok_or_else(|| overflow("a host offset"))?;
                let count = self.get(image, cluster)?;
                let left = count.checked_sub(1).ok_or_else(|| {
                    image.corrupt(offset.0, format!("the cluster at offset {offset} is in use but has refcount 0"))
                })?;
                self.set(image, cluster, left)?;
                match discards.last_mut() {
                    _ if left != 0 => {}
                    Some(last) if last.offset + last.length == offset.0 => last.length += bytes,
                    _ => discards.push(Request::discard(image.device, offset.0, bytes)),
                }
            }
            self.blocks.write_dirty(io)?;
            if !discards.is_empty() {
                io.run(&mut discards)?;
            }
        }
        Ok(())
    }
}
