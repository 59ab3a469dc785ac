//! Everything in an image that refers to a host cluster, each as often as it does.
//!
//! That is what refcounts count ("Host cluster management" in the specification): header, refcount table and blocks, the
//! active L1 table and those of the snapshots, the snapshot table, and what the bitmaps have; L2 tables, data clusters and
//! what compressed clusters touch once for each entry that points there.

use crate::image::{overflow, Image};
use crate::metadata::bitmap_directory::each_bitmap_cluster;
use crate::metadata::entries::scan_refcount_table;
use crate::metadata::l2_tables::L2Tables;
use crate::metadata::map::MetadataMap;
use crate::metadata::snapshot_table::SnapshotTable;
use crate::references::calculated::CalculatedRefcounts;
use alloc::format;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset};

/// What refers to clusters in one image.
pub(crate) struct References<'a> {
    image: &'a Image,
    metadata: &'a MetadataMap,
    snapshots: SnapshotTable,
}

impl<'a> References<'a> {
    pub(crate) fn new(io: &mut dyn BlockIo, image: &'a Image, metadata: &'a MetadataMap) -> DriverResult<Self> {
        Ok(Self { image, metadata, snapshots: SnapshotTable::read(io, image)? })
    }

    /// Count all references to clusters from `counts`' floor on.
    ///
    /// # Errors
    /// Corruption: a reference to what lies outside the file, or on metadata; [`ErrorCode::RefcountExhausted`]; I/O
    /// errors.
    pub(crate) fn count(&self, io: &mut dyn BlockIo, counts: &mut CalculatedRefcounts) -> DriverResult<()> {
        let (image, header) = (self.image, &self.image.header);
        let mut add_times = |cluster: HostCluster, times: u32| {
            if counts.add(cluster, times) {
                return Ok(());
            }
            let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
            let text = format!("the cluster at offset {offset} has too many references");
            Err(DriverError::new(ErrorCode::RefcountExhausted, text).at(image.device, offset.0))
        };
        let mut add = |cluster| add_times(cluster, 1);
        add(HostCluster(0))?;
        self.span(header.refcount_table, header.refcount_table_bytes(), &mut add)?;
        self.span(header.l1_table, header.l1_bytes(), &mut add)?;
        self.span(header.snapshot_table, self.snapshots.table_bytes, &mut add)?;
        scan_refcount_table(io, image, &mut |_, _, block| add(image.host_cluster(block)))?;
        each_bitmap_cluster(io, image, &mut |_, cluster| add(cluster))?;
        for snapshot in &self.snapshots.entries {
            self.span(snapshot.l1_table, u64::from(snapshot.l1_entries) * 8, &mut add)?;
        }
        let tables = L2Tables::read(io, image, &self.snapshots)?;
        tables.iter().try_for_each(|table| add_times(image.host_cluster(table.offset), table.times))?;
        tables.each_entry(io, image, &mut |referring| {
            referring.verify_bounds(image)?;
            referring.each_cluster(image, &mut |cluster| {
                if self.metadata.contains(cluster) {
                    return Err(points_to_metadata(image, referring.at, cluster));
                }
                add_times(cluster, referring.times)
            })
        })?;
        self.bitmaps_alone(io, counts)
    }

    /// The clusters of a structure of `bytes` bytes at `offset`.
    fn span(
        &self,
        offset: HostOffset,
        bytes: u64,
        add: &mut dyn FnMut(HostCluster) -> DriverResult<()>,
    ) -> DriverResult<()> {
        let size = self.image.cluster_size();
        let first = size.host_cluster(offset).0;
        let end = first.checked_add(size.count_for(bytes)).ok_or_else(|| overflow("the end of a table"))?;
        (first..end).map(HostCluster).try_for_each(add)
    }

    /// The clusters of bitmaps are nobody else's.
    fn bitmaps_alone(&self, io: &mut dyn BlockIo, counts: &CalculatedRefcounts) -> DriverResult<()> {
        each_bitmap_cluster(io, self.image, &mut |at, cluster| {
            if counts.get(cluster).is_none_or(|count| count == 1) {
                return Ok(());
            }
            let offset = self.image.cluster_size().host_offset(cluster).unwrap_or_default();
            Err(self.image.corrupt(at, format!("a bitmap at offset {offset} overlaps another structure")))
        })
    }
}

/// The corruption of an L2 entry at byte `at` that takes a table for data.
pub(crate) fn points_to_metadata(image: &Image, at: u64, cluster: HostCluster) -> DriverError {
    let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
    image.corrupt(at, format!("an L2 entry points to offset {offset}, which is metadata"))
}
