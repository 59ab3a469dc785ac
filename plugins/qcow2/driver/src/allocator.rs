//! Allocating clusters of a backing at the end of the file; refcount blocks and table grow as needed. (Those that are
//! free within the file go first: see [`free_clusters`](crate::free_clusters).)
//!
//! Everything here happens in memory (in slices of the refcount structures); [`write`](crate::write) makes
//! it durable in an order that never lets a reference point at a cluster with refcount 0.

use crate::image::{overflow, Image};
use crate::refcounts::Refcounts;
use crate::slice_cache::SliceCache;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{ClusterSize, HostCluster, HostOffset, MAX_REFCOUNT_TABLE_BYTES};

/// Clusters that follow each other in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first cluster.
    pub start: HostCluster,
    /// How many.
    pub count: u64,
}

/// Hands out clusters past the end of the file. They read as zeroes.
#[derive(Debug)]
pub struct Allocator {
    next: HostCluster,
    /// The last refcount block that the plan needs: a new table has room for it.
    last_block: u64,
    /// Refcount tables that a larger one replaced: to be freed once the header points to that.
    pub retired_tables: Vec<Run>,
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
fn growth(refcounts: &Refcounts, size: ClusterSize, start: HostCluster, last_block: u64) -> DriverResult<(u64, u64)> {
    let per_block = refcounts.per_block();
    let first = start.0 / per_block;
    let (mut blocks, mut table) = (1, 1);
    loop {
        // The last cluster of the blocks, the table, and one more to hand out.
        let last = (start.0 + blocks + table) / per_block;
        let new_table = grown_table_clusters(size, refcounts.table_entries, last.max(last_block))?;
        let new_blocks = last - first + 1;
        if (new_blocks, new_table) == (blocks, table) {
            return Ok((blocks, table));
        }
        (blocks, table) = (new_blocks.max(blocks), new_table.max(table));
    }
}

impl Allocator {
    /// An allocator that begins at the end of the image's file.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        let next = HostCluster(image.cluster_size().count_for(image.file_length));
        Self { next, last_block: 0, retired_tables: Vec::new() }
    }

    /// The first cluster that it would hand out.
    #[must_use]
    pub fn next(&self) -> HostCluster {
        self.next
    }

    /// Upper bound of the file's length in clusters after `count` clusters were handed out.
    ///
    /// # Errors
    /// [`ErrorCode::RefcountExhausted`] if the refcount table cannot grow so far.
    pub fn bound(&mut self, image: &Image, refcounts: &Refcounts, count: u64) -> DriverResult<u64> {
        if count == 0 {
            return Ok(self.next.0);
        }
        let size = image.cluster_size();
        let per_block = refcounts.per_block();
        let blocks = count / (per_block - 1).max(1) + 2;
        let end = self.next.0.checked_add(count + blocks).ok_or_else(|| overflow("the length of the file"))?;
        if end / per_block < refcounts.table_entries {
            return Ok(end);
        }
        // One new table, made at once for everything that was planned.
        let mut table = 0;
        loop {
            let needed = end + table + table / per_block + 2;
            self.last_block = needed / per_block;
            let clusters = grown_table_clusters(size, refcounts.table_entries, self.last_block)?;
            if clusters <= table {
                return Ok(needed);
            }
            table = clusters;
        }
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
    ) -> DriverResult<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut remaining = count;
        while remaining > 0 {
            let (block_index, index) = refcounts.locate(self.next);
            if block_index >= refcounts.table_entries {
                self.grow_table(io, image, refcounts)?;
                continue;
            }
            refcounts.table.load(io, [refcounts.table_entry_at(block_index)])?;
            if refcounts.block(image, block_index, |offset| image.holds_cluster(offset))?.is_none() {
                self.add_block(image, refcounts, block_index)?;
                continue;
            }
            let span = (refcounts.per_block() - index).min(remaining);
            let first = self.next.0;
            refcounts.load(io, image, (first..first + span).map(HostCluster))?;
            for cluster in (first..first + span).map(HostCluster) {
                // A cluster past the end of the file that claims to be in use is left alone.
                if refcounts.get(image, cluster)? == 0 {
                    refcounts.set(image, cluster, 1)?;
                    remaining -= 1;
                    match runs.last_mut() {
                        Some(run) if run.start.0 + run.count == cluster.0 => run.count += 1,
                        _ => runs.push(Run { start: cluster, count: 1 }),
                    }
                }
            }
            self.advance(image, span)?;
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
                set_block(image, refcounts, at, cluster)?;
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
            set_block(image, refcounts, refcounts.table_entry_at(index), cluster)?;
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

    /// A new refcount block at the next cluster, which it describes itself.
    fn add_block(&mut self, image: &mut Image, refcounts: &mut Refcounts, block_index: u64) -> DriverResult<()> {
        let cluster = self.next;
        self.advance(image, 1)?;
        let at = refcounts.table_entry_at(block_index);
        set_block(image, refcounts, at, cluster)?;
        mark_new(image, refcounts, cluster)
    }

    /// A larger refcount table past everything that the old one can describe, with the blocks for itself.
    fn grow_table(&mut self, io: &mut dyn BlockIo, image: &mut Image, refcounts: &mut Refcounts) -> DriverResult<()> {
        let size = image.cluster_size();
        let start = self.next;
        let (blocks, clusters) = growth(refcounts, size, start, self.last_block)?;
        let offset = size.host_offset(HostCluster(start.0 + blocks)).ok_or_else(|| overflow("the refcount table"))?;
        let mut table = SliceCache::new(image.device, image.slice_size());
        let per_slice = image.slice_size() as u64 / 8;
        let (old_offset, old_entries) = (refcounts.table_offset.0, refcounts.table_entries);
        refcounts.table.load(io, (0..old_entries.div_ceil(per_slice)).map(|i| old_offset + i * per_slice * 8))?;
        for index in 0..old_entries {
            let value = refcounts.table.entry(old_offset + index * 8)?;
            if value != 0 {
                table.insert_zeroed(offset.0 + index * 8);
                table.set_entry(offset.0 + index * 8, value)?;
            }
        }
        let old_clusters = size.count_for(old_entries * 8);
        self.retired_tables.push(Run { start: size.host_cluster(refcounts.table_offset), count: old_clusters });
        refcounts.table = table;
        refcounts.table_offset = offset;
        refcounts.table_entries = clusters * size.l2_entries();
        self.advance(image, blocks + clusters)?;
        let first_block = start.0 / refcounts.per_block();
        for block in 0..blocks {
            let at = refcounts.table_entry_at(first_block + block);
            refcounts.table.insert_zeroed(at);
            set_block(image, refcounts, at, HostCluster(start.0 + block))?;
        }
        for cluster in start.0..start.0 + blocks + clusters {
            // Its slices of the table exist; those that are all zero were not put in.
            refcounts.table.insert_zeroed(refcounts.table_entry_at(refcounts.locate(HostCluster(cluster)).0));
            mark_new(image, refcounts, HostCluster(cluster))?;
        }
        Ok(())
    }
}

/// Let the table entry at byte offset `at` (a loaded slice) point to a block at `cluster`.
fn set_block(image: &Image, refcounts: &mut Refcounts, at: u64, cluster: HostCluster) -> DriverResult<()> {
    let offset: HostOffset =
        image.cluster_size().host_offset(cluster).ok_or_else(|| overflow("the offset of a refcount block"))?;
    refcounts.table.set_entry(at, offset.0)
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
