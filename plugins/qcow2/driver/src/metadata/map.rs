//! Which clusters of a backing are metadata: data must never be written there.

use crate::image::Image;
use crate::metadata::cluster_run::ClusterRun;
use crate::metadata::reference::Structure;
use crate::metadata::structures::{Kinds, Structures};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::HostCluster;

/// Refuse sorted ranges (first and last cluster) that overlap.
///
/// # Errors
/// Corruption.
pub fn refuse_overlaps(image: &Image, ranges: &[(u64, u64)]) -> DriverResult<()> {
    for pair in ranges.windows(2) {
        if pair[1].0 <= pair[0].1 {
            let offset = image.cluster_size().host_offset(HostCluster(pair[1].0)).unwrap_or_default();
            return Err(image.corrupt(offset.0, format!("two metadata structures overlap at offset {offset}")));
        }
    }
    Ok(())
}

/// Merge the L2 tables of one snapshot, which are those from index `before` on, with those of the snapshots before it. A
/// table may be of several snapshots, but it maps one part of the disk.
///
/// # Errors
/// Corruption: a snapshot has a table twice.
fn merge_shared(image: &Image, shared: &mut Vec<(u64, u64)>, before: usize) -> DriverResult<()> {
    let own = shared.get_mut(before..).unwrap_or_default();
    own.sort_unstable();
    refuse_overlaps(image, own)?;
    shared.sort_unstable();
    shared.dedup();
    Ok(())
}

/// Header, L1 tables, refcount table and blocks, snapshot table, bitmaps, and all L2 tables of an image.
#[derive(Debug)]
pub struct MetadataMap {
    /// First and last cluster of each structure, sorted.
    ranges: Vec<(u64, u64)>,
    /// How many L2 tables there are, those of snapshots included.
    l2_tables: u64,
}

impl MetadataMap {
    /// Read the tables of the image; `bitmaps` are the first and last clusters of what its bitmaps have.
    ///
    /// # Errors
    /// Corruption: a table entry that points outside the file, or two structures that overlap;
    /// [`ErrorCode::ScratchTooSmall`]; I/O errors.
    pub fn build(io: &mut dyn BlockIo, image: &Image, bitmaps: Vec<(u64, u64)>) -> DriverResult<Self> {
        let mut structures = Structures::new(image);
        structures.snapshots(io)?;
        let room = io.heap_free() / 4 / core::mem::size_of::<(u64, u64)>();
        let push = |ranges: &mut Vec<(u64, u64)>, run: ClusterRun| {
            if ranges.len() >= room {
                return Err(DriverError::new(ErrorCode::ScratchTooSmall, "the image has too many tables"));
            }
            ranges.push((run.start.0, run.end() - 1));
            Ok(())
        };
        let mut ranges = bitmaps;
        let others = Kinds::HEADER | Kinds::SNAPSHOTS | Kinds::REFCOUNT_BLOCKS;
        structures.visit(io, others, &mut |reference| push(&mut ranges, reference.run))?;
        // All tables, also those of what lies past the end of the virtual disk: no refcount block may be one of them.
        let others = ranges.len();
        structures.visit(io, Kinds::ACTIVE_L2, &mut |reference| push(&mut ranges, reference.run))?;
        // A snapshot shares its L2 tables with the active state, and with other snapshots, until they are written to.
        let mut shared = Vec::new();
        let (mut of, mut before) = (Structure::Header, 0);
        structures.visit(io, Kinds::INACTIVE_L2, &mut |reference| {
            if of != reference.structure {
                merge_shared(image, &mut shared, before)?;
                (of, before) = (reference.structure, shared.len());
            }
            push(&mut shared, reference.run)
        })?;
        merge_shared(image, &mut shared, before)?;
        if !shared.is_empty() {
            let mut active: Vec<u64> = Vec::new();
            structures.visit(io, Kinds::ACTIVE_L2, &mut |reference| {
                active.push(reference.run.start.0);
                Ok(())
            })?;
            active.sort_unstable();
            shared.retain(|range| active.binary_search(&range.0).is_err());
            ranges.append(&mut shared);
        }
        let l2_tables = (ranges.len() - others) as u64;
        ranges.sort_unstable();
        refuse_overlaps(image, &ranges)?;
        Ok(Self { ranges, l2_tables })
    }

    /// How many L2 tables there are, each counted once, those of snapshots included.
    #[must_use]
    pub fn l2_tables(&self) -> u64 {
        self.l2_tables
    }

    /// The clusters around one that are no metadata, as the first and the one after the last; `None` if it is metadata.
    #[must_use]
    pub fn gap(&self, cluster: HostCluster) -> Option<(u64, u64)> {
        let after = self.ranges.partition_point(|range| range.0 <= cluster.0);
        let start = after.checked_sub(1).and_then(|i| self.ranges.get(i)).map_or(0, |range| range.1.saturating_add(1));
        let end = self.ranges.get(after).map_or(u64::MAX, |range| range.0);
        (start <= cluster.0).then_some((start, end))
    }

    /// Whether any cluster of `first..end` is metadata.
    #[must_use]
    pub fn overlaps(&self, first: u64, end: u64) -> bool {
        first < end && self.gap(HostCluster(first)).is_none_or(|gap| gap.1 < end)
    }

    /// Whether a cluster is metadata.
    #[must_use]
    pub fn contains(&self, cluster: HostCluster) -> bool {
        let after = self.ranges.partition_point(|range| range.0 <= cluster.0);
        after > 0 && self.ranges[after - 1].1 >= cluster.0
    }
}
