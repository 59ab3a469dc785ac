//! Making new clusters count: refcounts, refcount blocks and a longer refcount table become durable, in this order.
//!
//! 1. Refcounts, and whole new blocks; also a whole new table, if there is one, *then a flush*, which covers as well what
//!    the caller wrote into new clusters. Nothing refers to new clusters, blocks or tables yet: a crash leaves leaks.
//! 2. The table's entries for new blocks, or the header's switch to the new table (12 bytes within one sector), *then a
//!    flush*. A crash before it is durable leaves leaks; after it, new clusters with refcount 1.
//!
//! Whoever refers to a new cluster does so after this. The clusters of a table that was replaced may be freed then.

use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::refcount::allocator::Allocator;
use crate::refcount::blocks::Refcounts;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_qcow2_format::{HostCluster, REFCOUNT_TABLE_FIELD};

/// The structures of an image that say which clusters are in use, and what writes to its device.
pub(crate) struct Publication<'a> {
    pub(crate) image: &'a mut Image,
    pub(crate) refcounts: &'a mut Refcounts,
    pub(crate) allocator: &'a mut Allocator,
    pub(crate) out: &'a mut OrderedWriter,
    /// Set as soon as the device may refer to new blocks or to a new table.
    pub(crate) referenced: &'a mut bool,
}

impl Publication<'_> {
    fn flush(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.out.barrier(io)
    }

    /// Both steps; durable when it returns. Returns the clusters of tables that were replaced, to be freed.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn run(mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<HostCluster>> {
        if self.refcounts.blocks.is_dirty() {
            self.out.written();
        }
        self.refcounts.blocks.write_dirty(io)?;
        let retired = core::mem::take(&mut self.allocator.retired_tables);
        if retired.is_empty() {
            self.flush(io)?;
            if self.refcounts.table.is_dirty() {
                *self.referenced = true;
                self.out.written();
                self.refcounts.table.write_dirty(io)?;
            }
            self.flush(io)?;
            return Ok(Vec::new());
        }
        // The new table is written whole: where it has no slices, its place reads as zeroes.
        self.out.written();
        self.refcounts.table.write_dirty(io)?;
        self.flush(io)?;
        let clusters = self.refcounts.table_entries / self.image.cluster_size().l2_entries();
        self.image.header.refcount_table = self.refcounts.table_offset;
        self.image.header.refcount_table_clusters =
            u32::try_from(clusters).map_err(|_| overflow("the length of the refcount table"))?;
        let mut field = [0; 12];
        field[..8].copy_from_slice(&self.image.header.refcount_table.0.to_be_bytes());
        field[8..].copy_from_slice(&self.image.header.refcount_table_clusters.to_be_bytes());
        *self.referenced = true;
        self.out.write(io, REFCOUNT_TABLE_FIELD, &field)?;
        self.flush(io)?;
        Ok(retired.iter().flat_map(ClusterRun::clusters).collect())
    }
}
