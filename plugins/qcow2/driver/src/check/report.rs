//! Examining an image for a report: what a check of it prints, and nothing that a commit relies on.
//!
//! All references are counted ([`calculate`]) and compared with the refcounts, and the COPIED flags with those. A
//! structure that makes no sense (a table outside the file, an entry that points to metadata) ends the examination with
//! that finding: what it should refer to is not known, so that counts would be wrong from there on.

use crate::image::Image;
use crate::metadata::entries::scan_l1_flags;
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::metadata::snapshot_table::SnapshotTable;
use crate::metadata::structures::Structures;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use crate::references::calculate::calculate;
use crate::references::calculated::CalculatedRefcounts;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{Examination, FindingKind};
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{get_refcount, HostCluster, L2Entry, Version};

/// Memory for the counts of one pass, in bytes: dense, about four million clusters.
const COUNT_BUDGET: usize = 16 << 20;

/// Takes what is found.
pub(crate) type Finding<'a> = &'a mut dyn FnMut(FindingKind, &str);

/// What is being examined, and what was found so far.
struct Examiner<'a> {
    image: &'a Image,
    refcounts: Refcounts,
    found: Examination,
    finding: Finding<'a>,
}

/// A table or cluster that an entry of the active state refers to, and whether the entry says COPIED.
struct Referred {
    cluster: HostCluster,
    copied: bool,
    /// Where the entry stands in the file, in bytes.
    at: u64,
    what: &'static str,
}

/// Compare all references with refcounts and flags, and count clusters. What is found is handed to `finding`, too.
///
/// # Errors
/// I/O errors, and what is no corruption.
pub(crate) fn examine(io: &mut dyn BlockIo, image: &Image, finding: Finding<'_>) -> DriverResult<Examination> {
    let size = image.cluster_size();
    let found = Examination { total_clusters: size.count_for(image.header.virtual_size), ..Examination::default() };
    let mut examiner = Examiner { image, refcounts: Refcounts::new(image), found, finding };
    match examiner.run(io) {
        Err(error) if error.code == image.corrupt_code() => {
            examiner.corruption(format!("{}; the rest was not looked at", error.text));
        }
        ended => ended?,
    }
    Ok(examiner.found)
}

impl Examiner<'_> {
    fn corruption(&mut self, text: impl Into<String>) {
        self.found.corruptions += 1;
        (self.finding)(FindingKind::Corruption, &text.into());
    }

    fn run(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let metadata = MetadataMap::build(io, self.image, Vec::new())?;
        let mut structures = Structures::new(self.image);
        self.snapshot_sizes(structures.snapshots(io)?);
        let mut floor = HostCluster(0);
        loop {
            let mut counts = CalculatedRefcounts::new(floor, COUNT_BUDGET.min(io.heap_free() / 3));
            calculate(io, &mut structures, &metadata, &mut counts)?;
            self.compare(io, &counts)?;
            self.undescribed(io, &counts)?;
            match counts.next_floor() {
                Some(next) => floor = next,
                None => break,
            }
        }
        self.l1_flags(io)?;
        self.clusters(io)?;
        // Of a device, what lies behind the image is not the image's.
        let length = if self.image.fixed_length { 0 } else { self.image.clustered_length() };
        self.found.unused_tail = length.saturating_sub(self.found.image_end_offset);
        Ok(())
    }

    /// In version 3 every snapshot records its virtual size ("Snapshots", extra data): without it, it would read as another
    /// disk once the image grows.
    fn snapshot_sizes(&mut self, snapshots: &SnapshotTable) {
        for (index, snapshot) in snapshots.entries.iter().enumerate() {
            if self.image.header.version == Version::V3 && snapshot.virtual_size.is_none() {
                self.corruption(format!("the entry of snapshot {} does not record its virtual size", index + 1));
            }
        }
    }

    /// Clusters up to the end of the file: what lies past it is nobody's.
    fn clusters_in_file(&self) -> u64 {
        self.image.cluster_size().count_for(self.image.file_length)
    }

    /// Compare the refcounts that are there with what was counted.
    fn compare(&mut self, io: &mut dyn BlockIo, counts: &CalculatedRefcounts) -> DriverResult<()> {
        let image = self.image;
        let (order, per_block) = (self.refcounts.order(), self.refcounts.per_block());
        let slice = image.slice_size() as u64;
        let per_slice = order.entries_in(slice);
        let (floor, ceiling) = counts.range();
        let end = ceiling.min(self.clusters_in_file());
        for index in floor / per_block..self.refcounts.table_entries.min(end.div_ceil(per_block)) {
            self.refcounts.table.shrink(CLUSTERS_PER_LOAD);
            self.refcounts.blocks.shrink(0);
            self.refcounts.table.load(io, [self.refcounts.table_entry_at(index)])?;
            let Some(block) = self.refcounts.block(image, index, |offset| image.holds_cluster(offset))? else {
                continue;
            };
            // First cluster of a slice, and where the slice stands.
            let slices: Vec<(u64, u64)> = (0..per_block / per_slice)
                .map(|i| (index * per_block + i * per_slice, block.0 + i * slice))
                .filter(|&(first, _)| first < end && first + per_slice > floor)
                .collect();
            self.refcounts.blocks.load(io, slices.iter().map(|&(_, at)| at))?;
            for (first, at) in slices {
                let bytes = self.refcounts.blocks.bytes(at)?.to_vec();
                for (position, cluster) in (first..end.min(first + per_slice)).enumerate() {
                    if cluster >= floor {
                        let refcount = get_refcount(&bytes, order, position).unwrap_or(0);
                        self.one(HostCluster(cluster), refcount, counts.get(HostCluster(cluster)).unwrap_or(0));
                    }
                }
            }
        }
        Ok(())
    }

    /// Clusters with references that no refcount block describes.
    fn undescribed(&mut self, io: &mut dyn BlockIo, counts: &CalculatedRefcounts) -> DriverResult<()> {
        let end = self.clusters_in_file();
        let mut last = None;
        for (cluster, count) in counts.iter() {
            let (index, _) = self.refcounts.locate(cluster);
            let missing = match last {
                Some((known, missing)) if known == index => missing,
                _ if index >= self.refcounts.table_entries => true,
                _ => {
                    self.refcounts.table.shrink(CLUSTERS_PER_LOAD);
                    self.refcounts.table.load(io, [self.refcounts.table_entry_at(index)])?;
                    self.refcounts.block(self.image, index, |_| true)?.is_none()
                }
            };
            last = Some((index, missing));
            // What lies past the end of the file was not compared.
            if missing || cluster.0 >= end {
                self.one(cluster, 0, count);
            }
        }
        Ok(())
    }

    /// One cluster: its refcount, and how many references there are.
    fn one(&mut self, cluster: HostCluster, refcount: u64, references: u64) {
        if refcount == 0 && references == 0 {
            return;
        }
        let end = self.image.cluster_size().host_offset(HostCluster(cluster.0.saturating_add(1)));
        self.found.image_end_offset = self.found.image_end_offset.max(end.map_or(u64::MAX, |end| end.0));
        if refcount < references {
            let text = format!("cluster {} refcount={refcount} reference={references}", cluster.0);
            self.corruption(text);
        } else if refcount > references {
            self.found.leaks += 1;
            let text = format!("cluster {} refcount={refcount} reference={references}", cluster.0);
            (self.finding)(FindingKind::Leak, &text);
        }
    }

    /// COPIED in L1 entries of the active state: the L2 table has refcount 1 ("L1 table entry", bit 63).
    fn l1_flags(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let image = self.image;
        let (table, entries) = (image.header.l1_table, u64::from(image.header.l1_entries));
        let mut first = 0;
        loop {
            let mut batch = Vec::new();
            let mut next = entries;
            scan_l1_flags(io, image, table, entries, &mut |index, at, table, copied| {
                if index >= first && batch.len() < CLUSTERS_PER_LOAD {
                    batch.push(Referred { cluster: image.host_cluster(table), copied, at, what: "L2 table" });
                } else if index >= first {
                    next = next.min(index);
                }
                Ok(())
            })?;
            self.flags(io, &batch)?;
            if next == entries {
                return Ok(());
            }
            first = next;
        }
    }

    /// COPIED in L2 entries, likewise, and how many clusters of which kind there are.
    fn clusters(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let header = &self.image.header;
        let coverage = header.l2_coverage().max(1);
        let bytes = self.image.cluster_size().bytes();
        let image = &self.image.mapped_by(header.l1_table, header.l1_entries);
        let mut walker = MappedClusters::new(image);
        // The last cluster of plain data in the same L2 table ends here.
        let mut before: Option<(u64, u64)> = None;
        let mut from = Some(0);
        while let Some(first) = from.take() {
            let mut batch = Vec::new();
            let found = &mut self.found;
            walker.walk(io, image, first, &mut |mapped| {
                if batch.len() == CLUSTERS_PER_LOAD {
                    from = Some(mapped.guest);
                    return Ok(false);
                }
                let table = mapped.guest / coverage;
                if let L2Entry::Compressed { .. } = mapped.entry {
                    found.allocated_clusters += 1;
                    found.compressed_clusters += 1;
                    found.fragmented_clusters += 1;
                }
                if let Some((offset, copied)) = mapped.entry.host() {
                    found.allocated_clusters += 1;
                    let follows = before.is_none_or(|(same, end)| same != table || end == offset.0);
                    found.fragmented_clusters += u64::from(!follows);
                    before = Some((table, offset.0.saturating_add(bytes)));
                    let cluster = image.host_cluster(offset);
                    batch.push(Referred { cluster, copied, at: mapped.at, what: "data cluster" });
                }
                Ok(true)
            })?;
            self.flags(io, &batch)?;
        }
        Ok(())
    }

    /// COPIED must be set where the refcount is 1, and nowhere else.
    fn flags(&mut self, io: &mut dyn BlockIo, referred: &[Referred]) -> DriverResult<()> {
        self.refcounts.table.shrink(CLUSTERS_PER_LOAD);
        self.refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        self.refcounts.load(io, self.image, referred.iter().map(|referred| referred.cluster))?;
        for Referred { cluster, copied, at, what } in referred {
            let refcount = self.refcounts.get(self.image, *cluster)?;
            if *copied != (refcount == 1) {
                let state = if *copied { "set" } else { "not set" };
                let offset = self.image.cluster_size().host_offset(*cluster).unwrap_or_default();
                self.corruption(format!(
                    "COPIED is {state} in the entry at offset {at} for the {what} at offset {offset}, whose refcount is \
                     {refcount}"
                ));
            }
        }
        Ok(())
    }
}
