//! Making new clusters count: refcounts, refcount blocks and a longer refcount table become durable.
//!
//! Everybody who allocates goes this way: windows of data, bitmaps, growth, and the repair of an image that was not closed
//! cleanly. The order, and the crash that each step survives:
//!
//! 1. Refcounts, and whole new blocks; also a whole new table, if there is one, *then a flush*, which covers as well what
//!    the caller wrote into new clusters. Nothing refers to new clusters, blocks or tables yet: a crash leaves leaks.
//! 2. The table's entries for new blocks, or the header's switch to the new table (12 bytes within one sector), *then a
//!    flush*. What they refer to is durable. A crash before it is durable leaves leaks; after it, new clusters with
//!    refcount 1.
//!
//! References to a new cluster are written after this. The clusters of a table that was replaced may be released then.

use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::refcount::space::Space;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_qcow2_format::{HostCluster, REFCOUNT_TABLE_FIELD};

impl Space {
    /// Both steps; durable when it returns. Returns the clusters of refcount tables that were replaced, to be released.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn publish(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        out: &mut OrderedWriter,
    ) -> DriverResult<Vec<HostCluster>> {
        // Step 1.
        if self.refcounts.blocks.is_dirty() {
            out.written();
        }
        self.refcounts.blocks.write_dirty(io)?;
        let retired = core::mem::take(&mut self.allocator.retired_tables);
        if retired.is_empty() {
            out.barrier(io)?;
            // Step 2.
            if self.refcounts.table.is_dirty() {
                self.referenced();
                out.written();
                self.refcounts.table.write_dirty(io)?;
            }
            out.barrier(io)?;
            return Ok(Vec::new());
        }
        // The new table is written whole: where it has no slices, its place reads as zeroes.
        out.written();
        self.refcounts.table.write_dirty(io)?;
        out.barrier(io)?;
        // Step 2.
        let clusters = self.refcounts.table_entries / image.cluster_size().l2_entries();
        image.header.refcount_table = self.refcounts.table_offset;
        image.header.refcount_table_clusters =
            u32::try_from(clusters).map_err(|_| overflow("the length of the refcount table"))?;
        let mut field = [0; 12];
        field[..8].copy_from_slice(&image.header.refcount_table.0.to_be_bytes());
        field[8..].copy_from_slice(&image.header.refcount_table_clusters.to_be_bytes());
        self.referenced();
        out.write(io, REFCOUNT_TABLE_FIELD, &field)?;
        out.barrier(io)?;
        Ok(retired.iter().flat_map(ClusterRun::clusters).collect())
    }
}
