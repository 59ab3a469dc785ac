//! Whether the rest of a backing agrees with what a commit is about to change.
//!
//! Planning looks at what the commit touches: each cluster that is written in place has refcount 1 and says COPIED. In a
//! damaged image that may be wrong: another L2 entry, of another part of the disk or of a snapshot, may refer to the same
//! cluster, or to one that has refcount 0, or to one past the end of the file. Writing there would change what a guest
//! reads elsewhere, and only a walk over all L2 tables shows it. It is made
//!
//! * where it is cheap: where all tables together are no longer than [`CHEAP`], or than the data that is committed;
//! * always where the backing has snapshots, which nobody would look at before they are needed, or stands on a device
//!   that keeps its length, where new clusters may be anywhere;
//! * where at least as many free clusters are gained as there are tables.
//!
//! Otherwise it is left out, and the summary of the plan says how many tables were not read.

use crate::image::Image;
use crate::metadata::l2_tables::L2Tables;
use crate::metadata::map::MetadataMap;
use crate::metadata::reference::Reference;
use crate::metadata::structures::Structures;
use crate::refcount::free_clusters::FreeClusters;
use crate::references::calculate::points_to_metadata;
use crate::references::calculated::CalculatedRefcounts;
use crate::references::cluster_set::ClusterSet;
use crate::references::compare::refuse_too_few;
use crate::write::backing::Backing;
use crate::write::plan::Plan;
use crate::write::touched::Touched;
use alloc::format;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostCluster;

/// Bytes of L2 tables that are read for the smallest commit: they map 64 GiB in clusters of 64 KiB.
const CHEAP: u64 = 8 << 20;
/// Memory for the counts of one pass, in bytes.
const COUNT_BUDGET: usize = 8 << 20;

/// Make the walk, if it is called for. `free` are the free clusters of the file that the commit would use; those that
/// may be used are returned. `allocates` tells whether the commit takes any new cluster, `repaired` whether the backing is
/// repaired, for which all references were counted.
///
/// # Errors
/// Corruption: a cluster that would be changed has more references than its refcount says; I/O errors.
pub(crate) fn cross_check(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    plan: &mut Plan,
    (free, allocates, repaired): (FreeClusters, bool, bool),
) -> DriverResult<FreeClusters> {
    plan.unread_tables = 0;
    // The repair has counted all references.
    if repaired || (!allocates && plan.touched.nothing()) {
        return Ok(free);
    }
    let tables = plan.metadata.l2_tables();
    let bytes = tables.saturating_mul(backing.image.cluster_size().bytes());
    let must = backing.image.header.snapshots != 0 || (backing.image.fixed_length && allocates);
    let cheap = bytes <= CHEAP.max(plan.committed);
    let gains = free.count() > 0 && free.count() >= tables;
    if !must && !cheap && !gains {
        plan.unread_tables = tables;
        return Ok(FreeClusters::default());
    }
    let tables = L2Tables::read(io, &mut Structures::new(&backing.image))?;
    let mut floor = HostCluster(0);
    let mut unused = true;
    loop {
        let counts = CalculatedRefcounts::new(floor, COUNT_BUDGET.min(io.heap_free() / 4));
        let image = &backing.image;
        let mut check = CrossCheck {
            image,
            metadata: &plan.metadata,
            touched: &plan.touched,
            free: &free,
            allocates,
            counts,
            gap: (0, 0),
            chunk: None,
            unused: true,
        };
        for table in tables.references(image) {
            if plan.touched.tables.may_contain(table.run.start) {
                check.add(table.run.start, &table)?;
            }
        }
        tables.each_entry(io, image, &mut |reference| check.entry(&reference))?;
        unused &= check.unused;
        let counts = check.counts;
        refuse_too_few(io, image, &mut backing.space.refcounts, &mut counts.iter())?;
        match counts.next_floor() {
            Some(next) => floor = next,
            None => break,
        }
    }
    Ok(if unused { free } else { FreeClusters::default() })
}

/// One pass over all entries.
struct CrossCheck<'a> {
    image: &'a Image,
    metadata: &'a MetadataMap,
    touched: &'a Touched,
    free: &'a FreeClusters,
    allocates: bool,
    counts: CalculatedRefcounts,
    /// Clusters (first, and the one after the last) that are known to be no metadata: entries that follow each other
    /// mostly refer to clusters that do.
    gap: (u64, u64),
    /// The last chunk of clusters that was looked at, if nothing in it is changed.
    chunk: Option<u64>,
    /// Whether no entry refers to a cluster that is said to be free.
    unused: bool,
}

impl CrossCheck<'_> {
    fn add(&mut self, cluster: HostCluster, reference: &Reference) -> DriverResult<()> {
        if self.counts.add(cluster, reference.times) {
            return Ok(());
        }
        let offset = self.image.cluster_size().host_offset(cluster).unwrap_or_default();
        Err(self.image.corrupt(reference.at, format!("the cluster at offset {offset} has too many references")))
    }

    fn entry(&mut self, reference: &Reference) -> DriverResult<()> {
        // New clusters follow the end of the file: what an entry refers to there would come to light.
        if self.allocates {
            reference.verify_bounds(self.image)?;
        }
        reference.run.clusters().try_for_each(|cluster| self.cluster(cluster, reference))
    }

    fn cluster(&mut self, cluster: HostCluster, reference: &Reference) -> DriverResult<()> {
        if !(self.gap.0..self.gap.1).contains(&cluster.0) {
            let gap = self.metadata.gap(cluster);
            self.gap = gap.ok_or_else(|| points_to_metadata(self.image, reference.at, cluster))?;
        }
        let chunk = ClusterSet::chunk_of(cluster);
        if self.chunk == Some(chunk) {
            return Ok(());
        }
        if self.free.count() == 0 && !self.touched.may_reach(chunk) {
            self.chunk = Some(chunk);
            return Ok(());
        }
        if self.touched.may_contain(cluster) {
            self.add(cluster, reference)?;
        }
        if self.touched.fresh.may_contain(cluster) {
            let offset = self.image.cluster_size().host_offset(cluster).unwrap_or_default();
            let text = format!("an L2 entry points to offset {offset}, a cluster with refcount 0");
            return Err(self.image.corrupt(reference.at, text));
        }
        self.unused &= !self.free.contains(cluster);
        Ok(())
    }
}
