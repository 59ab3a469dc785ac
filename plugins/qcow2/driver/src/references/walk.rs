//! The counted walk: all references of an image, held against its refcounts and COPIED flags.
//!
//! Examining an image and repairing it take the same walk, as in QEMU (`calculate_refcounts`, `compare_refcounts` and
//! `check_oflag_copied` in `block/qcow2-refcount.c`); what is done with a difference is a [`Comparison`]. Memory is
//! bounded: as many clusters are counted in a pass as fit, and blocks, tables and flags are looked at in batches.

use crate::image::{overflow, Image};
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
use instar_qcow2_format::{get_refcount, HostCluster, HostOffset};

/// Memory for the counts of one pass, in bytes: dense, about four million clusters.
const COUNT_BUDGET: usize = 16 << 20;

/// Entries of the L1 table whose COPIED flags are held at once.
const L1_ENTRIES: u64 = 1 << 14;

/// What is done with each count that may differ from the refcount.
pub(crate) trait Comparison {
    /// The refcounts of the image.
    fn refcounts(&mut self) -> &mut Refcounts;

    /// Look at a slice of a refcount block, which is held.
    fn slice(&mut self, slice: &BlockSlice, counts: &CalculatedRefcounts) -> DriverResult<()>;

    /// Look at a cluster with references that was in no slice: no block describes it, or it lies past the end of what is
    /// compared.
    fn undescribed(&mut self, cluster: HostCluster, references: u64) -> DriverResult<()>;

    /// Forget slices that are of no more use, or write them, before another block is read.
    fn bound(&mut self, io: &mut dyn BlockIo) -> DriverResult<()>;
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

impl BlockSlice {
    /// The clusters that are compared, each with its refcount, of a slice that is held.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub(crate) fn refcounts(&self, held: &Refcounts) -> DriverResult<impl Iterator<Item = (HostCluster, u64)>> {
        let (order, bytes) = (held.order(), held.blocks.bytes(self.at)?.to_vec());
        let start = self.clusters.start.checked_sub(self.first).and_then(|start| usize::try_from(start).ok());
        let start = start.ok_or_else(|| overflow("the index of a refcount"))?;
        let refcount =
            move |(cluster, position)| (HostCluster(cluster), get_refcount(&bytes, order, position).unwrap_or(0));
        Ok(self.clusters.clone().zip(start..).map(refcount))
    }
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
        comparison.bound(io)?;
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
    /// The cluster is one of the data file: nothing counts it, and the flag is set.
    pub(crate) outside: bool,
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

/// Walk the COPIED flags of the active state, in batches of `most` entries: those of the L1 table ("L1 table entry", bit
/// 63), then those of L2 entries ("Standard Cluster Descriptor"; of a compressed cluster it is always 0). Entries past the
/// end of the disk count like any other.
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
    // Each part begins where the last one ended, and is read once: an L1 table may have millions of entries.
    let mut first = 0;
    while first < entries {
        let part = entries.saturating_sub(first).min(L1_ENTRIES);
        let (mut wanted, place) = (Vec::new(), HostOffset(l1.0.saturating_add(first.saturating_mul(8))));
        scan_l1_flags(io, image, place, part, &mut |_, at, table, copied| {
            let entry = FlaggedEntry { cluster: image.host_cluster(table), copied, at, outside: false };
            if check.wants(&entry) {
                wanted.push(entry);
            }
            Ok(())
        })?;
        wanted.chunks(most.max(1)).try_for_each(|batch| check.batch(io, Level::L1, batch))?;
        first += part;
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
                let (cluster, outside) = (image.host_cluster(offset), image.data.is_some());
                let entry = FlaggedEntry { cluster, copied, at: mapped.at, outside };
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_qcow2_format::get_refcount;
    use instar_qcow2_testkit::builder::{Spec, State};

    /// What is found: clusters whose refcount is another number than their references, as (cluster, refcount, references).
    struct Differences {
        refcounts: Refcounts,
        found: Vec<(u64, u64, u64)>,
        /// Clusters that were compared, in their order.
        compared: Vec<u64>,
        batches: Vec<(Level, Vec<u64>)>,
        mapped: usize,
    }

    impl Comparison for Differences {
        fn refcounts(&mut self) -> &mut Refcounts {
            &mut self.refcounts
        }

        fn slice(&mut self, slice: &BlockSlice, counts: &CalculatedRefcounts) -> DriverResult<()> {
            for cluster in slice.clusters.clone() {
                let position = usize::try_from(cluster - slice.first).unwrap();
                let order = self.refcounts.order();
                let refcount = get_refcount(self.refcounts.blocks.bytes(slice.at)?, order, position).unwrap();
                let references = counts.get(HostCluster(cluster)).unwrap();
                if refcount != references {
                    self.found.push((cluster, refcount, references));
                }
                self.compared.push(cluster);
            }
            Ok(())
        }

        fn undescribed(&mut self, cluster: HostCluster, references: u64) -> DriverResult<()> {
            self.found.push((cluster.0, 0, references));
            Ok(())
        }

        fn bound(&mut self, _io: &mut dyn BlockIo) -> DriverResult<()> {
            self.refcounts.blocks.shrink(0);
            Ok(())
        }
    }

    impl FlagCheck for Differences {
        fn mapped(&mut self, _mapped: &Mapped) {
            self.mapped += 1;
        }

        fn wants(&mut self, entry: &FlaggedEntry) -> bool {
            entry.copied
        }

        fn batch(&mut self, _io: &mut dyn BlockIo, level: Level, entries: &[FlaggedEntry]) -> DriverResult<()> {
            self.batches.push((level, entries.iter().map(|entry| entry.cluster.0).collect()));
            Ok(())
        }
    }

    fn differences(image: &Image) -> Differences {
        let refcounts = Refcounts::new(image);
        Differences { refcounts, found: Vec::new(), compared: Vec::new(), batches: Vec::new(), mapped: 0 }
    }

    #[test]
    fn leaks_and_clusters_that_no_block_describes_are_found_in_one_walk() {
        // Header, refcount table and L1 table, then two leaks. Refcounts of 64 bits: a block describes 64 clusters.
        let spec = Spec { leaks: 2, refcount_order: 6, ..Spec::new(9, 200 << 9) };
        let (mut io, image) = open(&spec.with((0..100).map(|cluster| (cluster, State::Data(1)))));
        let metadata = MetadataMap::build(&mut io, &image, Vec::new()).unwrap();
        let clusters = image.file_length >> 9;
        // The second block goes: what it describes has no refcount.
        let mut table = Refcounts::new(&image);
        table.table.load(&mut io, [table.table_entry_at(1)]).unwrap();
        let block = table.table.entry(table.table_entry_at(1)).unwrap() >> 9;
        table.table.set_entry(table.table_entry_at(1), 0).unwrap();
        table.table.write_dirty(&mut io).unwrap();
        let mut differences = differences(&image);
        let mut structures = Structures::new(&image);
        each_pass(&mut io, &mut structures, &metadata, &mut |io, counts| {
            compare_refcounts(io, &image, counts, clusters, &mut differences)
        })
        .unwrap();
        // The block itself stands past what it described, and is a leak now.
        let mut expected = alloc::vec![(3, 1, 0), (4, 1, 0)];
        expected.extend((64..128.min(clusters)).filter(|&cluster| cluster != block).map(|cluster| (cluster, 0, 1)));
        if !(64..128).contains(&block) {
            expected.push((block, 1, 0));
        }
        expected.sort_unstable();
        differences.found.sort_unstable();
        assert_eq!(differences.found, expected);
        assert!(differences.compared.iter().copied().eq((0..64).chain(128..clusters)));
    }

    /// The work follows from the length of the table, however few entries are looked at at once.
    #[test]
    fn an_l1_table_is_read_once() {
        // 1500 tables, each of which maps 64 clusters of 512 bytes.
        let spec = Spec::new(9, (1500 * 64) << 9);
        let (mut io, image) = open(&spec.with((0..1500).map(|table| (table * 64, State::Data(1)))));
        let mut read = |most| {
            let before = io.bytes_read;
            check_copied_flags(&mut io, &image, most, &mut differences(&image)).unwrap();
            io.bytes_read - before
        };
        let (at_once, one_by_one) = (read(1 << 12), read(8));
        assert!(one_by_one <= 2 * at_once, "{one_by_one} bytes, and {at_once} in one batch");
    }

    #[test]
    fn every_flag_is_in_one_batch() {
        let states = (0..100).map(|cluster| (cluster, if cluster == 9 { State::Zero } else { State::Data(1) }));
        let (mut io, image) = open(&Spec::new(9, 200 << 9).with(states));
        let mut all = Vec::new();
        for most in [1, 7, 1000] {
            let mut differences = differences(&image);
            check_copied_flags(&mut io, &image, most, &mut differences).unwrap();
            assert!(differences.batches.iter().all(|(_, batch)| batch.len() <= most));
            let count = |level| -> usize {
                differences.batches.iter().filter(|(of, _)| *of == level).map(|(_, batch)| batch.len()).sum()
            };
            assert_eq!((count(Level::L1), count(Level::L2), differences.mapped), (2, 99, 100));
            all.push(differences.batches.into_iter().flat_map(|(_, batch)| batch).collect::<Vec<u64>>());
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
