//! Which clusters of a backing are metadata: data must never be written there.

use crate::image::Image;
use crate::scan::{scan_l1_table, scan_refcount_table};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::HostCluster;

/// Header, L1 table, refcount table and blocks, and all L2 tables of an image.
#[derive(Debug)]
pub struct MetadataMap {
    /// First and last cluster of each structure, sorted.
    ranges: Vec<(u64, u64)>,
}

impl MetadataMap {
    /// Read the tables of the image.
    ///
    /// # Errors
    /// Corruption: a table entry that points outside the file, or two structures that overlap;
    /// [`ErrorCode::ScratchTooSmall`]; I/O errors.
    pub fn build(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Self> {
        let size = image.cluster_size();
        let header = &image.header;
        let span = |offset, bytes: u64| {
            let first = size.host_cluster(offset).0;
            (first, first + size.count_for(bytes).max(1) - 1)
        };
        let mut ranges = Vec::new();
        ranges.push((0, 0));
        ranges.push(span(header.refcount_table, header.refcount_table_bytes()));
        if header.l1_entries != 0 {
            ranges.push(span(header.l1_table, header.l1_bytes()));
        }
        let room = io.heap_free() / 2 / core::mem::size_of::<(u64, u64)>();
        let mut push = |range: (u64, u64)| {
            if ranges.len() >= room / 2 {
                return Err(DriverError::new(ErrorCode::ScratchTooSmall, "the image has too many tables"));
            }
            ranges.push(range);
            Ok(())
        };
        scan_refcount_table(io, image, &mut |_, _, block| push(span(block, 1)))?;
        scan_l1_table(io, image, &mut |_, _, table| push(span(table, 1)))?;
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[1].0 <= pair[0].1 {
                let offset = size.host_offset(HostCluster(pair[1].0)).unwrap_or_default();
                return Err(image.corrupt(offset.0, format!("two metadata structures overlap at offset {offset}")));
            }
        }
        Ok(Self { ranges })
    }

    /// Whether a cluster is metadata.
    #[must_use]
    pub fn contains(&self, cluster: HostCluster) -> bool {
        let after = self.ranges.partition_point(|range| range.0 <= cluster.0);
        after > 0 && self.ranges[after - 1].1 >= cluster.0
    }
}
