//! Verifying an overlay before it is committed.
//!
//! Every structure is where it may be, no host cluster is used twice, and nothing that is used has refcount
//! 0. A refcount that is too high is a leak and harms nobody. Memory is bounded: see
//! [`ClusterSet`](crate::cluster_set::ClusterSet).

use crate::cluster_set::ClusterSet;
use crate::image::Image;
use crate::refcounts::{Refcounts, CLUSTERS_PER_LOAD};
use crate::scan::{scan_l1_table, scan_refcount_table};
use crate::source::{compressed, Qcow2Source};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset, L2Entry};

/// Memory for the set of referenced clusters, in bytes: 128 million clusters a pass.
const SET_BUDGET: usize = 16 << 20;

impl Qcow2Source {
    /// Verify the whole image; returns the number of clusters that it holds.
    pub(crate) fn check_image(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty {
            self.image.refuse_unwritable()?;
        }
        let mut floor = HostCluster(0);
        loop {
            let mut set = ClusterSet::new(floor, SET_BUDGET);
            self.add_metadata(io, &mut set)?;
            let clusters = self.add_clusters(io, &mut set)?;
            check_refcounts(io, &self.image, &set)?;
            match set.next_floor() {
                Some(next) => floor = next,
                None => return Ok(clusters),
            }
        }
    }

    /// Header, refcount table and blocks, L1 table, L2 tables.
    fn add_metadata(&self, io: &mut dyn BlockIo, set: &mut ClusterSet) -> DriverResult<()> {
        let header = &self.image.header;
        let (l1_table, l1_bytes) = (header.l1_table, header.l1_bytes());
        let (table, table_bytes) = (header.refcount_table, header.refcount_table_bytes());
        add_range(&self.image, set, HostOffset(0), 1, "the header", 0)?;
        add_range(&self.image, set, table, table_bytes, "the refcount table", 48)?;
        add_range(&self.image, set, l1_table, l1_bytes, "the L1 table", 40)?;
        let image = &self.image;
        scan_refcount_table(io, image, &mut |index, at, block| {
            add_one(image, set, block, at, || format!("refcount block {index}"))
        })?;
        scan_l1_table(io, image, &mut |index, at, table| add_one(image, set, table, at, || format!("L2 table {index}")))
    }

    /// Everything that L2 entries refer to; returns the number of clusters that the image holds.
    fn add_clusters(&mut self, io: &mut dyn BlockIo, set: &mut ClusterSet) -> DriverResult<u64> {
        let mut clusters = 0;
        self.walk(io, 0, &mut |image, guest, at, entry| {
            if let L2Entry::Compressed { .. } = entry {
                return Err(compressed(image, guest, at));
            }
            clusters += 1;
            if let Some((offset, _)) = entry.host() {
                let needed = match entry {
                    L2Entry::Data { .. } => image.cluster_size().bytes().min(image.header.virtual_size - guest),
                    _ => 0,
                };
                if !image.holds_cluster(offset) || !image.holds_bytes(offset, needed) {
                    return Err(image.corrupt(
                        at,
                        format!(
                            "the L2 entry of guest offset {guest} points to offset {offset}, past the end of the file"
                        ),
                    ));
                }
                add_one(image, set, offset, at, || format!("the cluster of guest offset {guest}"))?;
            }
            Ok(true)
        })?;
        Ok(clusters)
    }
}

fn add_one(
    image: &Image,
    set: &mut ClusterSet,
    offset: HostOffset,
    at: u64,
    what: impl Fn() -> alloc::string::String,
) -> DriverResult<()> {
    if set.insert(image.host_cluster(offset)) {
        return Ok(());
    }
    Err(image.corrupt(at, format!("{} at offset {offset} overlaps another structure", what())))
}

fn add_range(
    image: &Image,
    set: &mut ClusterSet,
    offset: HostOffset,
    bytes: u64,
    what: &str,
    at: u64,
) -> DriverResult<()> {
    let size = image.cluster_size();
    let first = size.host_cluster(offset).0;
    for cluster in first..first.saturating_add(size.count_for(bytes)) {
        if !set.insert(HostCluster(cluster)) {
            return Err(image.corrupt(at, format!("{what} at offset {offset} overlaps another structure")));
        }
    }
    Ok(())
}

/// No cluster of the set may have refcount 0.
fn check_refcounts(io: &mut dyn BlockIo, image: &Image, set: &ClusterSet) -> DriverResult<()> {
    let mut refcounts = Refcounts::new(image);
    let mut clusters = set.iter();
    loop {
        let batch: Vec<HostCluster> = clusters.by_ref().take(CLUSTERS_PER_LOAD).collect();
        if batch.is_empty() {
            return Ok(());
        }
        refcounts.table.shrink(CLUSTERS_PER_LOAD);
        refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        refcounts.load(io, image, batch.iter().copied())?;
        for &cluster in &batch {
            if refcounts.get(image, cluster)? == 0 {
                let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
                return Err(
                    image.corrupt(offset.0, format!("the cluster at offset {offset} is in use but has refcount 0"))
                );
            }
        }
    }
}
