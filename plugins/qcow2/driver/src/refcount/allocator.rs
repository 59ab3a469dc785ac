//! Allocating clusters of a backing; refcount blocks and table grow as needed.
//!
//! In a file, new clusters follow its end, and read as zeroes. (Those that are free within the file go first: see
//! [`free_clusters`](crate::refcount::free_clusters).) A device that keeps its length has no such end: there the clusters
//! with refcount 0 are handed out in their order, also those that no refcount block describes yet, and they hold whatever
//! was there before. So refcount blocks and tables are written whole there, and everybody else zeroes what he does not
//! write.
//!
//! Everything here happens in memory (in slices of the refcount structures); `publish` makes
//! it durable in an order that never lets a reference point at a cluster with refcount 0.

use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::metadata::slice_cache::SliceCache;
use crate::refcount::blocks::Refcounts;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{ClusterSize, HostCluster, HostOffset, MAX_REFCOUNT_TABLE_BYTES};

/// Slices of refcount blocks that are held while the refcounts are walked, at most, besides those that changed.
pub(crate) const SLICES_HELD: usize = 256;

/// Hands out clusters.
#[derive(Debug)]
pub struct Allocator {
    pub(crate) next: HostCluster,
    /// Whether new clusters may hold stale bytes: see [`Image::fixed_length`].
    stale: bool,
    /// The last refcount block that the plan needs: a new table has room for it.
    pub(crate) last_block: u64,
    /// Refcount tables that a larger one replaced: to be freed once the header points to that.
    pub retired_tables: Vec<ClusterRun>,
}

fn out_of_table() -> DriverError {
    DriverError::new(ErrorCode::RefcountExhausted, "the refcount table cannot grow beyond 8 MiB")
}

/// Clusters of a new refcount table that must describe block `last_block` at least.
fn grown_table_clusters(size: ClusterSize, old_entries: u64, last_block: u64) -> DriverResult<u64> {
    let limit = MAX_REFCOUNT_TABLE_BYTES.max(size.bytes()) / 8;
    if last_block >= limit {
        return Err(out_of_table());
    }
    // Half as much again, so that a table does not grow often.
    let entries = (last_block + 1).max(old_entries + old_entries / 2).min(limit);
    Ok(size.count_for(entries * 8))
}

/// Refcount blocks and table clusters of a new table that begins to describe at cluster `start`.
pub(crate) fn growth(
    (per_block, entries): (u64, u64),
    size: ClusterSize,
    start: HostCluster,
    last_block: u64,
) -> DriverResult<(u64, u64)> {
    let first = start.0 / per_block;
    let (mut blocks, mut table) = (1, 1);
    loop {
        // The last cluster of the blocks, the table, and one more to hand out.
        let last = (start.0 + blocks + table) / per_block;
        let new_table = grown_table_clusters(size, entries, last.max(last_block))?;
        let new_blocks = last - first + 1;
        if (new_blocks, new_table) == (blocks, table) {
            return Ok((blocks, table));
        }
        (blocks, table) = (new_blocks.max(blocks), new_table.max(table));
    }
}

impl Allocator {
    /// An allocator that begins at the end of the image's file, or of a device at its first cluster.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        let end = HostCluster(image.cluster_size().count_for(image.file_length));
        let next = if image.fixed_length { HostCluster(0) } else { end };
        Self { next, stale: image.fixed_length, last_block: 0, retired_tables: Vec::new() }
    }

    /// The first cluster that it would hand out.
    #[must_use]
    pub fn next(&self) -> HostCluster {
        self.next
    }

    /// Hand out `count` clusters with refcount 1, in as few runs as there are.
    ///
    /// # Errors
    /// [`ErrorCode::RefcountExhausted`], corruption of the refcount table, I/O errors.
    pub fn reserve(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        refcounts: &mut Refcounts,
        count: u64,
    ) -> DriverResult<Vec<ClusterRun>> {
        let mut runs: Vec<ClusterRun> = Vec::new();
        let mut remaining = count;
        while remaining > 0 {
            let (block_index, _) = refcounts.locate(self.next);
            if block_index >= refcounts.table_entries {
                self.grow_table(io, image, refcounts)?;
                continue;
            }
            if !refcounts.describes(io, image, block_index)? {
                self.add_block(image, refcounts, block_index)?;
                continue;
            }
            let first = self.next.0;
            let until = refcounts.look_ahead(image, first, remaining);
            refcounts.blocks.shrink(SLICES_HELD);
            refcounts.load(io, image, (first..until).map(HostCluster))?;
            // What has a refcount is left alone: on a device it is in use, past the end of a file a crash leaked it.
            let mut found: Vec<ClusterRun> = Vec::new();
            refcounts.each_free_run(image, first, until, &mut |start, after| {
                let count = remaining.min(after - start);
                found.push(ClusterRun { start: HostCluster(start), count });
                remaining -= count;
                remaining > 0
            })?;
            let next = found.last().filter(|_| remaining == 0).map_or(until, |run| run.start.0 + run.count);
            for run in found {
                let mut clusters = (run.start.0..run.start.0 + run.count).map(HostCluster);
                clusters.try_for_each(|cluster| refcounts.set(image, cluster, 1))?;
                match runs.last_mut() {
                    Some(last) if last.start.0 + last.count == run.start.0 => last.count += run.count,
                    _ => runs.push(run),
                }
            }
            self.advance(image, next - first)?;
        }
        Ok(runs)
    }

    /// Make sure that there is a refcount block with this index. A new one stands past the end of the file.
    ///
    /// # Errors
    /// As [`Allocator::reserve`].
    pub fn describe(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        refcounts: &mut Refcounts,
        block_index: u64,
    ) -> DriverResult<()> {
        let mut spare = None;
        loop {
            if block_index >= refcounts.table_entries {
                self.last_block = self.last_block.max(block_index);
                self.grow_table(io, image, refcounts)?;
                continue;
            }
            let at = refcounts.table_entry_at(block_index);
            refcounts.table.load(io, [at])?;
            if refcounts.block(image, block_index, |offset| image.holds_cluster(offset))?.is_some() {
                // A cluster that was handed out for the block lies within what the block describes by itself.
                return match spare {
                    Some(cluster) => refcounts.set(image, cluster, 0),
                    None => Ok(()),
                };
            }
            if refcounts.locate(self.next).0 == block_index {
                self.add_block(image, refcounts, block_index)?;
            } else if let Some(cluster) = spare.take() {
                refcounts.table.load(io, [at])?;
                self.set_new_block(image, refcounts, at, cluster)?;
            } else {
                let runs = self.reserve(io, image, refcounts, 1)?;
                spare = runs.first().map(|run| run.start);
            }
        }
    }

    /// Go on at this cluster, and leave those before it free.
    pub fn skip_to(&mut self, cluster: HostCluster) {
        self.next = self.next.max(cluster);
    }

    /// Hand out `count` clusters that follow each other, with refcount 1. The clusters from the next one on, as many and
    /// the blocks that describe them, must be free, and all within the reach of the refcount table or all past it.
    ///
    /// # Errors
    /// As [`Allocator::reserve`].
    pub fn reserve_run(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        refcounts: &mut Refcounts,
        count: u64,
    ) -> DriverResult<HostCluster> {
        if refcounts.locate(self.next).0 >= refcounts.table_entries {
            self.grow_table(io, image, refcounts)?;
        }
        // The blocks that are missing come first.
        let first = self.next.0;
        let mut missing: Vec<u64> = Vec::new();
        loop {
            let end = first + missing.len() as u64 + count;
            let indices = refcounts.locate(self.next).0..=refcounts.locate(HostCluster(end - 1)).0;
            if *indices.end() >= refcounts.table_entries {
                return Err(overflow("the reach of the refcount table"));
            }
            refcounts
                .table
                .load(io, indices.clone().map(|index| refcounts.table_entry_at(index)).collect::<Vec<_>>())?;
            let before = missing.len();
            missing.clear();
            for index in indices {
                if refcounts.block(image, index, |offset| image.holds_cluster(offset))?.is_none() {
                    missing.push(index);
                }
            }
            if missing.len() == before {
                break;
            }
        }
        let start = first + missing.len() as u64;
        let clusters = || (first..start + count).map(HostCluster);
        refcounts.load(io, image, clusters())?;
        for cluster in clusters() {
            if refcounts.get(image, cluster)? != 0 {
                return Err(overflow("a run of free clusters"));
            }
        }
        self.advance(image, start + count - first)?;
        for (index, cluster) in missing.into_iter().zip(clusters()) {
            self.set_new_block(image, refcounts, refcounts.table_entry_at(index), cluster)?;
        }
        clusters().try_for_each(|cluster| mark_new(image, refcounts, cluster))?;
        Ok(HostCluster(start))
    }

    fn advance(&mut self, image: &mut Image, clusters: u64) -> DriverResult<()> {
        self.next = HostCluster(self.next.0 + clusters);
        let end = image.cluster_size().host_offset(self.next).ok_or_else(|| overflow("the length of the file"))?;
        if end.0 > i64::MAX as u64 {
            return Err(overflow("the length of the file"));
        }
        image.file_length = image.file_length.max(end.0);
        Ok(())
    }

    /// Let the table entry at byte offset `at` (a loaded slice) point to a new block at `cluster`.
    fn set_new_block(
        &self,
        image: &Image,
        refcounts: &mut Refcounts,
        at: u64,
        cluster: HostCluster,
    ) -> DriverResult<()> {
        let size = image.cluster_size();
        let block: HostOffset = size.host_offset(cluster).ok_or_else(|| overflow("the offset of a refcount block"))?;
        if self.stale {
            let slices = size.bytes() / image.slice_size() as u64;
            (0..slices).for_each(|i| refcounts.blocks.insert_new(block.0 + i * image.slice_size() as u64));
        }
        refcounts.table.set_entry(at, block.0)
    }

    /// A new refcount block at the next cluster, which it describes itself.
    fn add_block(&mut self, image: &mut Image, refcounts: &mut Refcounts, block_index: u64) -> DriverResult<()> {
        let cluster = self.next;
        self.advance(image, 1)?;
        let at = refcounts.table_entry_at(block_index);
        self.set_new_block(image, refcounts, at, cluster)?;
        mark_new(image, refcounts, cluster)
    }

    /// A larger refcount table past everything that the old one can describe, with the blocks for itself.
    fn grow_table(&mut self, io: &mut dyn BlockIo, image: &mut Image, refcounts: &mut Refcounts) -> DriverResult<()> {
        let size = image.cluster_size();
        let start = self.next;
        let now = (refcounts.per_block(), refcounts.table_entries);
        let (blocks, clusters) = growth(now, size, start, self.last_block)?;
        let offset = size.host_offset(HostCluster(start.0 + blocks)).ok_or_else(|| overflow("the refcount table"))?;
        let mut table = SliceCache::new(image.device, image.slice_size());
        let per_slice = image.slice_size() as u64 / 8;
        let (old_offset, old_entries) = (refcounts.table_offset.0, refcounts.table_entries);
        refcounts.table.load(io, (0..old_entries.div_ceil(per_slice)).map(|i| old_offset + i * per_slice * 8))?;
        if self.stale {
            let slices = clusters * size.bytes() / image.slice_size() as u64;
            (0..slices).for_each(|i| table.insert_new(offset.0 + i * image.slice_size() as u64));
        }
        for index in 0..old_entries {
            let value = refcounts.table.entry(old_offset + index * 8)?;
            if value != 0 {
                table.insert_zeroed(offset.0 + index * 8);
                table.set_entry(offset.0 + index * 8, value)?;
            }
        }
        let old_clusters = size.count_for(old_entries * 8);
        self.retired_tables.push(ClusterRun { start: size.host_cluster(refcounts.table_offset), count: old_clusters });
        refcounts.table = table;
        refcounts.table_offset = offset;
        refcounts.table_entries = clusters * size.l2_entries();
        self.advance(image, blocks + clusters)?;
        let first_block = start.0 / refcounts.per_block();
        for block in 0..blocks {
            let at = refcounts.table_entry_at(first_block + block);
            refcounts.table.insert_zeroed(at);
            self.set_new_block(image, refcounts, at, HostCluster(start.0 + block))?;
        }
        for cluster in start.0..start.0 + blocks + clusters {
            // Its slices of the table exist; those that are all zero were not put in.
            refcounts.table.insert_zeroed(refcounts.table_entry_at(refcounts.locate(HostCluster(cluster)).0));
            mark_new(image, refcounts, HostCluster(cluster))?;
        }
        Ok(())
    }
}

/// Refcount 1 for a cluster whose block is new (and so reads as zeroes).
fn mark_new(image: &Image, refcounts: &mut Refcounts, cluster: HostCluster) -> DriverResult<()> {
    let (block_index, index) = refcounts.locate(cluster);
    if let Some(block) = refcounts.block(image, block_index, |_| true)? {
        let (slice, _) = refcounts.blocks.locate_refcount(block.0, refcounts.order(), index);
        refcounts.blocks.insert_zeroed(slice);
    }
    refcounts.set(image, cluster, 1)
}
