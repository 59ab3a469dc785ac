//! Which clusters of a backing are metadata: data must never be written there.

use crate::image::Image;
use crate::metadata::entries::{scan_l1_at, scan_refcount_table};
use crate::metadata::snapshot_table::SnapshotTable;
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
        let size = image.cluster_size();
        let header = &image.header;
        let span = |offset, bytes: u64| {
            let first = size.host_cluster(offset).0;
            (first, first + size.count_for(bytes).max(1) - 1)
        };
        let mut ranges = bitmaps;
        ranges.extend([(0, 0), span(header.refcount_table, header.refcount_table_bytes())]);
        if header.l1_entries != 0 {
            ranges.push(span(header.l1_table, header.l1_bytes()));
        }
        let snapshots = SnapshotTable::read(io, image)?;
        if snapshots.table_bytes != 0 {
            ranges.push(span(header.snapshot_table, snapshots.table_bytes));
        }
        for snapshot in snapshots.entries.iter().filter(|snapshot| snapshot.l1_entries != 0) {
            ranges.push(span(snapshot.l1_table, u64::from(snapshot.l1_entries) * 8));
        }
        let room = io.heap_free() / 4 / core::mem::size_of::<(u64, u64)>();
        let push = |ranges: &mut Vec<(u64, u64)>, range: (u64, u64)| {
            if ranges.len() >= room {
                return Err(DriverError::new(ErrorCode::ScratchTooSmall, "the image has too many tables"));
            }
            ranges.push(range);
            Ok(())
        };
        scan_refcount_table(io, image, &mut |_, _, block| push(&mut ranges, span(block, 1)))?;
        // All tables, also those of what lies past the end of the virtual disk: no refcount block may be one of them.
        let (l1, l1_entries) = (header.l1_table, u64::from(header.l1_entries));
        let others = ranges.len();
        scan_l1_at(io, image, l1, l1_entries, &mut |_, _, table| push(&mut ranges, span(table, 1)))?;
        // A snapshot shares its L2 tables with the active state, and with other snapshots, until they are written to.
        let mut shared = Vec::new();
        for snapshot in &snapshots.entries {
            let entries = u64::from(snapshot.l1_entries);
            let before = shared.len();
            scan_l1_at(io, image, snapshot.l1_table, entries, &mut |_, _, table| push(&mut shared, span(table, 1)))?;
            let own = shared.get_mut(before..).unwrap_or_default();
            own.sort_unstable();
            // A table may be of several snapshots, but it maps one part of the disk.
            refuse_overlaps(image, own)?;
            shared.sort_unstable();
            shared.dedup();
        }
        if !shared.is_empty() {
            let mut active: Vec<u64> = Vec::new();
            scan_l1_at(io, image, l1, l1_entries, &mut |_, _, table| {
                active.push(size.host_cluster(table).0);
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
