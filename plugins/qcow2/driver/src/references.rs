//! Everything in an image that refers to a host cluster, each as often as it does.
//!
//! That is what refcounts count ("Host cluster management" in the specification): header, refcount table and blocks, the
//! active L1 table and those of the snapshots, the snapshot table, and what the bitmaps have; L2 tables, data clusters and
//! what compressed clusters touch once for each entry that points there.

use crate::bitmaps::each_bitmap_cluster;
use crate::image::{overflow, Image};
use crate::metadata_map::MetadataMap;
use crate::scan::{scan_l1_at, scan_refcount_table};
use crate::snapshots::Snapshots;
use crate::source::{compressed_range, Mapped, Qcow2Source};
use alloc::format;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset, L2Entry};

use crate::reference_counts::ReferenceCounts;

/// What refers to clusters in one image.
pub(crate) struct References<'a> {
    image: &'a Image,
    metadata: &'a MetadataMap,
    snapshots: Snapshots,
}

impl<'a> References<'a> {
    pub(crate) fn new(io: &mut dyn BlockIo, image: &'a Image, metadata: &'a MetadataMap) -> DriverResult<Self> {
        Ok(Self { image, metadata, snapshots: Snapshots::read(io, image)? })
    }

    /// Count all references to clusters from `counts`' floor on.
    ///
    /// # Errors
    /// Corruption: a reference to what lies outside the file, or on metadata; [`ErrorCode::RefcountExhausted`]; I/O
    /// errors.
    pub(crate) fn count(&self, io: &mut dyn BlockIo, counts: &mut ReferenceCounts) -> DriverResult<()> {
        let (image, header) = (self.image, &self.image.header);
        let mut add = |cluster: HostCluster| {
            if counts.add(cluster) {
                return Ok(());
            }
            let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
            let text = format!("the cluster at offset {offset} has too many references");
            Err(DriverError::new(ErrorCode::RefcountExhausted, text).at(image.device, offset.0))
        };
        add(HostCluster(0))?;
        self.span(header.refcount_table, header.refcount_table_bytes(), &mut add)?;
        self.span(header.l1_table, header.l1_bytes(), &mut add)?;
        self.span(header.snapshot_table, self.snapshots.table_bytes, &mut add)?;
        scan_refcount_table(io, image, &mut |_, _, block| add(image.host_cluster(block)))?;
        each_bitmap_cluster(io, image, &mut |_, cluster| add(cluster))?;
        self.mapped(io, image.mapped_by(header.l1_table, header.l1_entries), &mut add)?;
        for snapshot in &self.snapshots.entries {
            self.span(snapshot.l1_table, u64::from(snapshot.l1_entries) * 8, &mut add)?;
            self.mapped(io, image.mapped_by(snapshot.l1_table, snapshot.l1_entries), &mut add)?;
        }
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

    /// L2 tables, and what they map. `view` is the image with one of its L1 tables.
    fn mapped(
        &self,
        io: &mut dyn BlockIo,
        view: Image,
        add: &mut dyn FnMut(HostCluster) -> DriverResult<()>,
    ) -> DriverResult<()> {
        let size = view.cluster_size();
        let entries = u64::from(view.header.l1_entries);
        scan_l1_at(io, &view, view.header.l1_table, entries, &mut |_, _, table| add(size.host_cluster(table)))?;
        let metadata = self.metadata;
        Qcow2Source::new(view).walk(io, 0, &mut |image, mapped| {
            let Mapped { guest, at, entry, .. } = mapped;
            let mut add_data = |cluster: HostCluster| {
                if !metadata.contains(cluster) {
                    return add(cluster);
                }
                let offset = size.host_offset(cluster).unwrap_or_default();
                Err(image.corrupt(at, format!("an L2 entry points to offset {offset}, which is metadata")))
            };
            if let L2Entry::Compressed { descriptor } = entry {
                compressed_range(image, guest, at, descriptor)?.host_clusters(size).try_for_each(&mut add_data)?;
            }
            if let Some((offset, _)) = entry.host() {
                if !image.holds_cluster(offset) {
                    let text = format!("an L2 entry points to offset {offset}, past the end of the file");
                    return Err(image.corrupt(at, text));
                }
                add_data(size.host_cluster(offset))?;
            }
            Ok(true)
        })
    }

    /// The clusters of bitmaps are nobody else's.
    fn bitmaps_alone(&self, io: &mut dyn BlockIo, counts: &ReferenceCounts) -> DriverResult<()> {
        each_bitmap_cluster(io, self.image, &mut |at, cluster| {
            if counts.get(cluster).is_none_or(|count| count == 1) {
                return Ok(());
            }
            let offset = self.image.cluster_size().host_offset(cluster).unwrap_or_default();
            Err(self.image.corrupt(at, format!("a bitmap at offset {offset} overlaps another structure")))
        })
    }
}
