//! Refcounts of an image: looked up through the refcount table, changed in slices.

use crate::image::{overflow, Image};
use crate::metadata::slice_cache::SliceCache;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{get_refcount, ClusterSize, HostCluster, HostOffset, RefcountOrder, RefcountTableEntry};

/// How many clusters a caller should handle between two calls of [`Refcounts::load`]: it bounds the slices
/// held at once to 16 MiB where every cluster has a slice of its own.
pub const CLUSTERS_PER_LOAD: usize = 4096;

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

    /// The cluster size of the image.
    pub(crate) fn cluster_size(&self) -> ClusterSize {
        self.cluster_size
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

    /// Whether there is a refcount block with this index.
    ///
    /// # Errors
    /// As [`Refcounts::load`].
    pub fn describes(&mut self, io: &mut dyn BlockIo, image: &Image, block_index: u64) -> DriverResult<bool> {
        if block_index < self.table_entries {
            self.table.load(io, [self.table_entry_at(block_index)])?;
        }
        Ok(self.block(image, block_index, |offset| image.holds_cluster(offset))?.is_some())
    }

    /// Up to which cluster it is best to look when `wanted` free ones are looked for from cluster `from` on: within one
    /// block, and whole slices of it.
    #[must_use]
    pub fn look_ahead(&self, image: &Image, from: u64, wanted: u64) -> u64 {
        let (per_block, per_slice) = (self.per_block(), self.order.entries_in(image.slice_size() as u64).max(1));
        let wanted = from.saturating_add(wanted).div_ceil(per_slice).saturating_mul(per_slice);
        wanted.min((from / per_block + 1) * per_block)
    }

    /// Call `each` with every run of clusters with refcount 0 within `first..end`, as its first cluster and the one after
    /// its last, until it returns `false`. The clusters were loaded and have one block, which is the same for all.
    ///
    /// # Errors
    /// As [`Refcounts::set`].
    pub fn each_free_run(
        &self,
        image: &Image,
        first: u64,
        end: u64,
        each: &mut dyn FnMut(u64, u64) -> bool,
    ) -> DriverResult<()> {
        let (block_index, mut index) = self.locate(HostCluster(first));
        let block =
            self.block(image, block_index, |_| true)?.ok_or_else(|| overflow("the index of a refcount block"))?;
        let per_slice = self.order.entries_in(image.slice_size() as u64).max(1);
        let mut run: Option<u64> = None;
        let mut at = first;
        while at < end {
            let (slice, within) = self.blocks.locate_refcount(block.0, self.order, index);
            let bytes = self.blocks.bytes(slice)?;
            let count = (per_slice - within as u64).min(end - at);
            for (cluster, position) in (at..at + count).zip(within..) {
                match (get_refcount(bytes, self.order, position), run) {
                    (Some(0), None) => run = Some(cluster),
                    (Some(0), Some(_)) => {}
                    (_, Some(start)) => {
                        run = None;
                        if !each(start, cluster) {
                            return Ok(());
                        }
                    }
                    (_, None) => {}
                }
            }
            at += count;
            index += count;
        }
        if let Some(start) = run {
            each(start, end);
        }
        Ok(())
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
