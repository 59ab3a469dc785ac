//! Examining an image for a report: what a check of it prints, and nothing that a commit relies on.
//!
//! All references are counted ([`each_pass`]) and compared with the refcounts, and the COPIED flags with those. A
//! structure that makes no sense (a table outside the file, an entry that points to metadata) ends the examination with
//! that finding: what it should refer to is not known, so that counts would be wrong from there on.

use crate::image::Image;
use crate::metadata::l2_entry::Mapped;
use crate::metadata::map::MetadataMap;
use crate::metadata::snapshot_table::SnapshotTable;
use crate::metadata::structures::Structures;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use crate::references::calculated::CalculatedRefcounts;
use crate::references::cluster_set::ClusterSet;
use crate::references::walk::{
    check_copied_flags, compare_refcounts, each_pass, BlockSlice, Comparison, FlagCheck, FlaggedEntry, Level,
};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{CheckSummary, FindingKind};
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{HostCluster, L2Entry, Version};

/// Takes what is found.
pub(crate) type Finding<'a> = &'a mut dyn FnMut(FindingKind, &str);

/// Memory in bytes for the clusters that entries of the active state name: all of a file of 3 TiB in clusters of 64 KiB. Those
/// behind are not compared with each other.
const ACTIVE_BYTES: usize = 8 << 20;

/// What is being examined, and what was found so far.
struct Examiner<'a> {
    image: &'a Image,
    refcounts: Refcounts,
    found: CheckSummary,
    finding: Finding<'a>,
    /// Of the last cluster of plain data: which L2 table has it, and the byte offset where it ends.
    last_data: Option<(u64, u64)>,
    /// What entries of the active state name.
    active: ClusterSet,
}

/// Compare all references with refcounts and flags, and count clusters. What is found is handed to `finding`, too.
///
/// # Errors
/// I/O errors, and what is no corruption.
pub(crate) fn examine(io: &mut dyn BlockIo, image: &Image, finding: Finding<'_>) -> DriverResult<CheckSummary> {
    let size = image.cluster_size();
    let found = CheckSummary { total_clusters: size.count_for(image.header.virtual_size), ..CheckSummary::default() };
    let active = ClusterSet::new(HostCluster(0), ACTIVE_BYTES);
    let mut examiner = Examiner { image, refcounts: Refcounts::new(image), found, finding, last_data: None, active };
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
        let image = self.image;
        let end = self.clusters_in_file();
        each_pass(io, &mut structures, &metadata, &mut |io, counts| compare_refcounts(io, image, counts, end, self))?;
        check_copied_flags(io, image, CLUSTERS_PER_LOAD, self)?;
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
}

impl Comparison for Examiner<'_> {
    fn refcounts(&mut self) -> &mut Refcounts {
        &mut self.refcounts
    }

    fn slice(&mut self, slice: &BlockSlice, counts: &CalculatedRefcounts) -> DriverResult<()> {
        for (cluster, refcount) in slice.refcounts(&self.refcounts)? {
            self.one(cluster, refcount, counts.get(cluster).unwrap_or(0));
        }
        Ok(())
    }

    fn undescribed(&mut self, cluster: HostCluster, references: u64) -> DriverResult<()> {
        self.one(cluster, 0, references);
        Ok(())
    }

    fn bound(&mut self, _io: &mut dyn BlockIo) -> DriverResult<()> {
        self.refcounts.table.shrink(CLUSTERS_PER_LOAD);
        self.refcounts.blocks.shrink(0);
        Ok(())
    }
}

impl FlagCheck for Examiner<'_> {
    /// How many clusters of which kind there are.
    fn mapped(&mut self, mapped: &Mapped) {
        let table = mapped.guest / self.image.header.l2_coverage().max(1);
        let found = &mut self.found;
        if let L2Entry::Compressed { .. } = mapped.entry {
            found.allocated_clusters += 1;
            found.compressed_clusters += 1;
            found.fragmented_clusters += 1;
        }
        if let Some((offset, _)) = mapped.entry.host() {
            found.allocated_clusters += 1;
            let follows = self.last_data.is_none_or(|(same, end)| same != table || end == offset.0);
            found.fragmented_clusters += u64::from(!follows);
            self.last_data = Some((table, offset.0.saturating_add(self.image.cluster_size().bytes())));
        }
        if let Some(text) = mapped.cut_off(self.image) {
            self.corruption(text);
        }
    }

    fn wants(&mut self, _entry: &FlaggedEntry) -> bool {
        true
    }

    /// COPIED must be set where the refcount is 1, and nowhere else.
    fn batch(&mut self, io: &mut dyn BlockIo, level: Level, entries: &[FlaggedEntry]) -> DriverResult<()> {
        let what = if level == Level::L1 { "L2 table" } else { "data cluster" };
        self.refcounts.table.shrink(CLUSTERS_PER_LOAD);
        self.refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        let counted = entries.iter().filter(|entry| !entry.outside);
        self.refcounts.load(io, self.image, counted.map(|entry| entry.cluster))?;
        for FlaggedEntry { cluster, copied, at, outside } in entries {
            if *outside {
                if !copied {
                    self.corruption(format!(
                        "COPIED is not set in the entry at offset {at} for a cluster of the data file"
                    ));
                }
                continue;
            }
            let refcount = self.refcounts.get(self.image, *cluster)?;
            if level == Level::L2 && !self.active.insert(*cluster) {
                let offset = self.image.cluster_size().host_offset(*cluster).unwrap_or_default();
                self.corruption(format!(
                    "the entry at offset {at} and another one name the data cluster at offset {offset}"
                ));
            }
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
