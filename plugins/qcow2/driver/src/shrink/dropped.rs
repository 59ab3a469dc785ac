//! What an image maps past its new end: verified before the first change, released after the switch.

use crate::image::Image;
use crate::metadata::l2_entry::{compressed_range, Mapped};
use crate::metadata::mapped_clusters::MappedClusters;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use crate::write::backing::Backing;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset, L2Entry};

/// The clusters that go.
#[derive(Debug)]
pub(super) struct Dropped {
    /// The image as the old L1 table maps it, all of its entries.
    old: Image,
    /// The guest byte from which on nothing is mapped any more: a multiple of the cluster size.
    cut: u64,
    /// The L2 tables that go.
    pub(super) tables: Vec<HostOffset>,
}

/// What was seen of the mapping that goes.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The first guest cluster past the new end that is mapped, as its first byte.
    pub(super) first: Option<u64>,
}

impl Dropped {
    pub(super) fn new(old: Image, cut: u64) -> Self {
        Self { old, cut, tables: Vec::new() }
    }

    /// Verify that everything that goes lies in the file and has a reference to lose.
    ///
    /// # Errors
    /// Corruption; I/O errors.
    pub(super) fn verify(&self, io: &mut dyn BlockIo, refcounts: &mut Refcounts) -> DriverResult<Seen> {
        let mut seen = Seen::default();
        self.each_batch(io, &mut |io, clusters, first| {
            seen.first.get_or_insert(first);
            self.verify_clusters(io, refcounts, &clusters)
        })?;
        Ok(seen)
    }

    /// The same of the tables, once they are known.
    ///
    /// # Errors
    /// As [`Dropped::verify`].
    pub(super) fn verify_tables(&self, io: &mut dyn BlockIo, refcounts: &mut Refcounts) -> DriverResult<()> {
        self.tables.chunks(CLUSTERS_PER_LOAD).try_for_each(|tables| {
            let clusters: Vec<_> = tables.iter().map(|&table| self.old.host_cluster(table)).collect();
            self.verify_clusters(io, refcounts, &clusters)
        })
    }

    fn verify_clusters(
        &self,
        io: &mut dyn BlockIo,
        refcounts: &mut Refcounts,
        clusters: &[HostCluster],
    ) -> DriverResult<()> {
        refcounts.table.shrink(CLUSTERS_PER_LOAD);
        refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        refcounts.load(io, &self.old, clusters.iter().copied())?;
        for &cluster in clusters {
            if refcounts.get(&self.old, cluster)? == 0 {
                let at = self.old.host_offset(cluster)?;
                return Err(self.old.corrupt(at.0, format!("the cluster at offset {at} is in use but has refcount 0")));
            }
        }
        Ok(())
    }

    /// Take their references away: of the data first, and then of the tables that say where it is. Nothing depends on it any
    /// more; it is durable with the next flush.
    ///
    /// # Errors
    /// I/O errors.
    pub(super) fn release(&mut self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        self.each_batch(io, &mut |io, clusters, _| backing.release(io, clusters))?;
        let tables = self.tables.drain(..).map(|table| backing.image.host_cluster(table)).collect();
        backing.release(io, tables)
    }

    /// Hand the host clusters that are mapped past the cut to `each`, some thousands at once, each as often as it is referred
    /// to, with the first guest byte that they are mapped at. Entries that refer to none come by in their turn.
    fn each_batch(&self, io: &mut dyn BlockIo, each: EachBatch<'_>) -> DriverResult<()> {
        let (old, size) = (&self.old, self.old.cluster_size());
        let mut walk = MappedClusters::new(old);
        let (mut from, end) = (self.cut, old.header.virtual_size);
        while from < end {
            let (mut clusters, mut first, mut next) = (Vec::new(), None, end);
            walk.walk_range(io, old, from..end, &mut |Mapped { guest, at, entry, .. }| {
                first.get_or_insert(guest);
                if let L2Entry::Compressed { descriptor } = entry {
                    clusters.extend(compressed_range(old, guest, at, descriptor)?.host_clusters(size));
                } else if let Some((offset, _)) = old.own_host(entry) {
                    if !old.holds_cluster(offset) {
                        let text = format!("guest offset {guest} points to offset {offset}, past the end of the file");
                        return Err(old.corrupt(at, text));
                    }
                    clusters.push(size.host_cluster(offset));
                }
                next = guest + size.bytes();
                Ok(clusters.len() < CLUSTERS_PER_LOAD)
            })?;
            let Some(first) = first else { return Ok(()) };
            // The walk came to its end, unless the batch is full.
            from = if clusters.len() < CLUSTERS_PER_LOAD { end } else { next };
            each(io, clusters, first)?;
        }
        Ok(())
    }
}

/// What is done with a batch.
type EachBatch<'a> = &'a mut dyn FnMut(&mut dyn BlockIo, Vec<HostCluster>, u64) -> DriverResult<()>;
