//! The counted walk: all references of an image, held against its refcounts and COPIED flags.
//!
//! Whoever examines an image and whoever repairs it do the same walk, as in QEMU (`calculate_refcounts`, `compare_refcounts`
//! and `check_oflag_copied` in `block/qcow2-refcount.c`); what is done with a difference is a [`Comparison`]. Memory is
//! bounded: as many clusters are counted in a pass as fit, and blocks, tables and flags are looked at in batches.

use crate::image::Image;
use crate::metadata::entries::scan_l1_flags;
use crate::metadata::l2_entry::Mapped;
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::metadata::structures::Structures;
use crate::refcount::blocks::Refcounts;
use crate::references::calculate::calculate;
use crate::references::calculated::CalculatedRefcounts;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostCluster;

/// Memory for the counts of one pass, in bytes: dense, about four million clusters.
const COUNT_BUDGET: usize = 16 << 20;

/// What is done with each count that may differ from the refcount.
pub(crate) trait Comparison {
    /// The refcounts of the image.
    fn refcounts(&mut self) -> &mut Refcounts;

    /// Look at a slice of a refcount block, which is held.
    fn slice(&mut self, slice: &BlockSlice, counts: &CalculatedRefcounts) -> DriverResult<()>;

    /// Look at a cluster with references that was in no slice: no block describes it, or it lies past the end of what is
    /// compared.
    fn undescribed(&mut self, cluster: HostCluster, references: u64) -> DriverResult<()>;

    /// Forget slices that are of no more use, before another block is read.
    fn bound(&mut self) -> DriverResult<()>;
}

/// A slice of a refcount block.
#[derive(Clone, Debug)]
pub(crate) struct BlockSlice {
    /// Byte offset in the file.
    pub(crate) at: u64,
    /// The cluster that its first refcount is of.
    pub(crate) first: u64,
    /// The clusters that are compared; all are in it.
    pub(crate) clusters: Range<u64>,
}

/// Call `each` with the counts of one pass after the other, until all references were counted. The metadata is where
/// `metadata` says.
///
/// # Errors
/// As [`calculate`], and what `each` returns.
pub(crate) fn each_pass(
    io: &mut dyn BlockIo,
    structures: &mut Structures<'_>,
    metadata: &MetadataMap,
    each: &mut dyn FnMut(&mut dyn BlockIo, &CalculatedRefcounts) -> DriverResult<()>,
) -> DriverResult<()> {
    let mut floor = HostCluster(0);
    loop {
        let mut counts = CalculatedRefcounts::new(floor, COUNT_BUDGET.min(io.heap_free() / 3));
        calculate(io, structures, metadata, &mut counts)?;
        each(io, &counts)?;
        match counts.next_floor() {
            Some(next) => floor = next,
            None => return Ok(()),
        }
    }
}

/// Compare the counts of one pass with the refcounts of the clusters before `end`.
///
/// # Errors
/// Corruption of the refcount table; I/O errors; what the comparison returns.
pub(crate) fn compare_refcounts(
    io: &mut dyn BlockIo,
    image: &Image,
    counts: &CalculatedRefcounts,
    end: u64,
    comparison: &mut dyn Comparison,
) -> DriverResult<()> {
    let refcounts = comparison.refcounts();
    let (per_block, table_entries) = (refcounts.per_block(), refcounts.table_entries);
    let slice = image.slice_size() as u64;
    let per_slice = refcounts.order().entries_in(slice);
    let (floor, ceiling) = counts.range();
    let end = ceiling.min(end);
    for index in floor / per_block..table_entries.min(end.div_ceil(per_block)) {
        comparison.bound()?;
        let refcounts = comparison.refcounts();
        if !refcounts.describes(io, image, index)? {
            continue;
        }
        let Some(block) = refcounts.block(image, index, |_| true)? else { continue };
        let slices = (0..per_block / per_slice)
            .map(|number| (index * per_block + number * per_slice, block.0 + number * slice))
            .map(|(first, at)| BlockSlice { at, first, clusters: first.max(floor)..end.min(first + per_slice) })
            .filter(|slice| !slice.clusters.is_empty());
        refcounts.blocks.load(io, slices.clone().map(|slice| slice.at))?;
        slices.into_iter().try_for_each(|slice| comparison.slice(&slice, counts))?;
    }
    // Clusters of which no slice was looked at.
    let mut last = None;
    for (cluster, references) in counts.iter() {
        let (index, _) = comparison.refcounts().locate(cluster);
        let missing = match last {
            Some((known, missing)) if known == index => missing,
            _ => !comparison.refcounts().describes(io, image, index)?,
        };
        last = Some((index, missing));
        if missing || cluster.0 >= end {
            comparison.undescribed(cluster, references)?;
        }
    }
    Ok(())
}

/// An entry of the active L1 table or of an L2 table that may have the COPIED flag.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlaggedEntry {
    /// The L2 table, or the cluster, that it refers to.
    pub(crate) cluster: HostCluster,
    /// Whether the flag is set.
    pub(crate) copied: bool,
    /// Byte offset in the file.
    pub(crate) at: u64,
}

/// Which tables entries are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// The L1 table: entries refer to L2 tables.
    L1,
    /// An L2 table: entries refer to data.
    L2,
}

/// What looks at the COPIED flags of the active state.
pub(crate) trait FlagCheck {
    /// Take note of a cluster that the active state maps.
    fn mapped(&mut self, _mapped: &Mapped) {}

    /// Whether this entry is to be in a batch.
    fn wants(&mut self, entry: &FlaggedEntry) -> bool;

    /// Look at a batch of entries that were wanted.
    fn batch(&mut self, io: &mut dyn BlockIo, level: Level, entries: &[FlaggedEntry]) -> DriverResult<()>;
}

/// Walk the COPIED flags of the active state, in batches of `most` entries: those of the L1 table ("L1 table entry", bit 63),
/// then those of L2 entries ("Standard Cluster Descriptor"; of a compressed cluster it is always 0). Entries past the end of
/// the disk count like any other.
///
/// # Errors
/// Corruption of a table; I/O errors; what `check` returns.
pub(crate) fn check_copied_flags(
    io: &mut dyn BlockIo,
    image: &Image,
    most: usize,
    check: &mut dyn FlagCheck,
) -> DriverResult<()> {
    let (l1, entries) = (image.header.l1_table, u64::from(image.header.l1_entries));
    let mut from = Some(0);
    while let Some(first) = from.take() {
        let mut batch = Vec::new();
        scan_l1_flags(io, image, l1, entries, &mut |index, at, table, copied| {
            let entry = FlaggedEntry { cluster: image.host_cluster(table), copied, at };
            if index < first || from.is_some() {
                return Ok(());
            }
            if batch.len() == most {
                from = Some(index);
            } else if check.wants(&entry) {
                batch.push(entry);
            }
            Ok(())
        })?;
        check.batch(io, Level::L1, &batch)?;
    }
    let view = &image.mapped_by(l1, image.header.l1_entries);
    let mut clusters = MappedClusters::new(view);
    let mut from = Some(0);
    while let Some(first) = from.take() {
        let mut batch = Vec::new();
        clusters.walk(io, view, first, &mut |mapped| {
            if batch.len() == most {
                from = Some(mapped.guest);
                return Ok(false);
            }
            check.mapped(&mapped);
            if let Some((offset, copied)) = mapped.entry.host() {
                let entry = FlaggedEntry { cluster: image.host_cluster(offset), copied, at: mapped.at };
                if check.wants(&entry) {
                    batch.push(entry);
                }
            }
            Ok(true)
        })?;
        check.batch(io, Level::L2, &batch)?;
    }
    Ok(())
}
