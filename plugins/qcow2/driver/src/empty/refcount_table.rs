//! The refcount table of an overlay that is emptied: which blocks go, and what the others say afterwards.
//!
//! A table has up to a million entries, of blocks that may stand anywhere: nothing here grows with their number but one
//! bit for each. What describes what is found by walking the table, more than once if need be; sets of clusters are kept
//! for as much of the file as fits, and the rest has a pass of its own (see
//! [`ClusterSet`](crate::references::cluster_set::ClusterSet)).

use crate::image::{overflow, Image};
use crate::refcount::blocks::Refcounts;
use crate::references::cluster_set::ClusterSet;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{set_refcount, HostCluster, HostOffset};

/// Blocks that describe each other in a longer chain than this stay in the table.
const MAX_ROUNDS: usize = 8;
/// Slices of the table that are looked at at once.
const SLICES: u64 = 16;

/// A set of indices of the refcount table.
#[derive(Clone, Debug)]
pub(crate) struct BlockSet {
    words: Vec<u64>,
}

impl BlockSet {
    fn position(index: u64) -> (usize, u64) {
        (usize::try_from(index / 64).unwrap_or(usize::MAX), 1 << (index % 64))
    }

    /// Add an index; returns whether it is new. What lies past the end of the table has no block: it is not added.
    pub(crate) fn insert(&mut self, index: u64) -> bool {
        let (word, mask) = Self::position(index);
        let Some(word) = self.words.get_mut(word) else { return false };
        let new = *word & mask == 0;
        *word |= mask;
        new
    }

    pub(crate) fn contains(&self, index: u64) -> bool {
        let (word, mask) = Self::position(index);
        self.words.get(word).is_some_and(|word| word & mask != 0)
    }
}

/// The blocks of a batch of table entries: their indices and offsets.
type Batch = Vec<(u64, HostOffset)>;

/// The refcount table of one image.
pub(crate) struct BlockTable<'a> {
    image: &'a Image,
    refcounts: Refcounts,
    /// The batch that was read last, and its number. Most tables have only one.
    held: Option<(u64, Batch)>,
}

impl<'a> BlockTable<'a> {
    pub(crate) fn new(image: &'a Image) -> Self {
        Self { image, refcounts: Refcounts::new(image), held: None }
    }

    /// No blocks.
    pub(crate) fn none(&self) -> BlockSet {
        let words = usize::try_from(self.refcounts.table_entries.div_ceil(64)).unwrap_or(0);
        BlockSet { words: vec![0; words] }
    }

    /// The index of the block that describes a cluster.
    pub(crate) fn describing(&self, cluster: HostCluster) -> u64 {
        self.refcounts.locate(cluster).0
    }

    /// What tells the index of the block that describes another block.
    fn describing_block(&self) -> impl Fn(HostOffset) -> u64 + use<> {
        let (order, size) = (self.refcounts.order(), self.image.cluster_size());
        move |block| order.locate(size, size.host_cluster(block)).0
    }

    fn batch_entries(&self) -> u64 {
        SLICES * self.image.slice_size() as u64 / 8
    }

    fn batches(&self) -> u64 {
        self.refcounts.table_entries.div_ceil(self.batch_entries())
    }

    /// Call `each` with index and offset of the blocks, ascending or descending, until it returns `false`.
    pub(crate) fn each_block(
        &mut self,
        io: &mut dyn BlockIo,
        descending: bool,
        each: &mut dyn FnMut(&mut dyn BlockIo, u64, HostOffset) -> DriverResult<bool>,
    ) -> DriverResult<()> {
        let batches = self.batches();
        for number in 0..batches {
            let number = if descending { batches - 1 - number } else { number };
            let blocks = self.batch(io, number)?;
            let mut goes_on = true;
            for i in 0..blocks.len() {
                let block = blocks.get(if descending { blocks.len() - 1 - i } else { i });
                if let Some(&(index, offset)) = block.filter(|_| goes_on) {
                    goes_on = each(io, index, offset)?;
                }
            }
            self.held = Some((number, blocks));
            if !goes_on {
                break;
            }
        }
        Ok(())
    }

    /// [`BlockTable::each_block`] of all blocks, for what needs no I/O.
    fn scan(&mut self, io: &mut dyn BlockIo, each: &mut dyn FnMut(u64, HostOffset)) -> DriverResult<()> {
        self.each_block(io, false, &mut |_, index, block| {
            each(index, block);
            Ok(true)
        })
    }

    /// The clusters of the blocks from `floor` on, as far as they fit into a set of `budget` bytes.
    pub(crate) fn own_clusters(
        &mut self,
        io: &mut dyn BlockIo,
        floor: HostCluster,
        budget: usize,
    ) -> DriverResult<ClusterSet> {
        let size = self.image.cluster_size();
        let mut own = ClusterSet::new(floor, budget);
        self.scan(io, &mut |_, block| {
            own.insert(size.host_cluster(block));
        })?;
        Ok(own)
    }

    /// The blocks of one batch.
    fn batch(&mut self, io: &mut dyn BlockIo, number: u64) -> DriverResult<Batch> {
        if let Some((_, blocks)) = self.held.take().filter(|held| held.0 == number) {
            return Ok(blocks);
        }
        let first = number * self.batch_entries();
        let indices = first..(first + self.batch_entries()).min(self.refcounts.table_entries);
        let refcounts = &mut self.refcounts;
        let (base, end) = (refcounts.table_entry_at(first), refcounts.table_entry_at(indices.end));
        refcounts.table.clear();
        refcounts.table.load(io, (base..end).step_by(self.image.slice_size()))?;
        let image = self.image;
        let mut blocks = Vec::new();
        for index in indices {
            blocks.extend(refcounts.block(image, index, |offset| image.holds_cluster(offset))?.map(|at| (index, at)));
        }
        Ok(blocks)
    }

    /// Add to `needed` the blocks that describe blocks in it. If that is a long chain, all blocks are needed.
    pub(crate) fn complete(&mut self, io: &mut dyn BlockIo, needed: &mut BlockSet) -> DriverResult<()> {
        let describing = self.describing_block();
        for _ in 0..MAX_ROUNDS {
            let mut more = false;
            self.scan(io, &mut |index, block| {
                more |= needed.contains(index) && needed.insert(describing(block));
            })?;
            if !more {
                return Ok(());
            }
        }
        needed.words.fill(u64::MAX);
        Ok(())
    }

    /// Take blocks from the table that are not `needed`, *with a flush* behind each batch; in rounds, so that a block that
    /// describes another one goes after that. With `release`, their own clusters lose their reference then, where a block
    /// that is left describes them.
    pub(crate) fn drop_blocks(&mut self, io: &mut dyn BlockIo, needed: &BlockSet, release: bool) -> DriverResult<()> {
        let describing = self.describing_block();
        for _ in 0..MAX_ROUNDS {
            let mut describes_others = self.none();
            self.scan(io, &mut |index, block| {
                let by = describing(block);
                if !needed.contains(index) && by != index {
                    describes_others.insert(by);
                }
            })?;
            let goes = |index| !needed.contains(index) && !describes_others.contains(index);
            let mut any = false;
            for number in 0..self.batches() {
                any |= self.drop_batch(io, number, &goes, release)?;
            }
            if !any {
                break;
            }
        }
        Ok(())
    }

    fn drop_batch(
        &mut self,
        io: &mut dyn BlockIo,
        number: u64,
        goes: &dyn Fn(u64) -> bool,
        release: bool,
    ) -> DriverResult<bool> {
        let (blocks, stay): (Batch, Batch) = self.batch(io, number)?.into_iter().partition(|&(index, _)| goes(index));
        self.held = Some((number, stay));
        if blocks.is_empty() {
            return Ok(false);
        }
        let mut refcounts = Refcounts::new(self.image);
        refcounts.table.load(io, blocks.iter().map(|&(index, _)| self.refcounts.table_entry_at(index)))?;
        for &(index, _) in &blocks {
            refcounts.table.set_entry(self.refcounts.table_entry_at(index), 0)?;
        }
        refcounts.table.write_dirty(io)?;
        io.flush(self.image.device)?;
        if release {
            // Those that described themselves went with their refcounts.
            let describing = self.describing_block();
            let described = blocks.iter().filter(|&&(index, block)| describing(block) != index);
            let clusters = described.map(|&(_, block)| self.image.host_cluster(block)).collect();
            refcounts.release(io, self.image, clusters)?;
        }
        Ok(true)
    }

    /// Set the refcounts of the clusters `range` to 1 where `stays` says so, and to 0 elsewhere, in all blocks that are in
    /// the table. Returns whether any has changed; no flush.
    pub(crate) fn rewrite(
        &mut self,
        io: &mut dyn BlockIo,
        range: core::ops::Range<u64>,
        stays: &ClusterSet,
    ) -> DriverResult<bool> {
        let per_block = self.refcounts.per_block();
        let slice = self.image.slice_size() as u64;
        let order = self.refcounts.order();
        let per_slice = order.entries_in(slice).max(1);
        let mut refcounts = Refcounts::new(self.image);
        let mut changed = false;
        self.each_block(io, false, &mut |io, index, block| {
            let first = index.saturating_mul(per_block);
            if first >= range.end {
                return Ok(false);
            }
            // First cluster of a slice, and where the slice stands.
            let slices: Vec<(u64, u64)> = (0..per_block / per_slice)
                .map(|i| (first + i * per_slice, block.0 + i * slice))
                .filter(|&(first, _)| first < range.end && first + per_slice > range.start)
                .collect();
            refcounts.blocks.clear();
            refcounts.blocks.load(io, slices.iter().map(|&(_, at)| at))?;
            for (first, at) in slices {
                let mut bytes = refcounts.blocks.bytes(at)?.to_vec();
                let whole = range.start <= first && first + per_slice <= range.end;
                if whole {
                    bytes.fill(0);
                }
                let mut cluster = first.max(range.start);
                while cluster < range.end.min(first + per_slice) {
                    // Whole chunks of the set are empty for the most part.
                    let chunk = ClusterSet::chunk_of(HostCluster(cluster));
                    if whole && !stays.may_reach(chunk) {
                        cluster = ClusterSet::first_of(chunk + 1).0;
                        continue;
                    }
                    let count = u64::from(stays.contains(HostCluster(cluster)));
                    let position = usize::try_from(cluster - first).map_err(|_| overflow("the index of a refcount"))?;
                    set_refcount(&mut bytes, order, position, count)
                        .ok_or_else(|| overflow("the index of a refcount"))?;
                    cluster += 1;
                }
                refcounts.blocks.replace(at, &bytes)?;
            }
            changed |= refcounts.blocks.is_dirty();
            refcounts.blocks.write_dirty(io)?;
            Ok(true)
        })?;
        Ok(changed)
    }
}
