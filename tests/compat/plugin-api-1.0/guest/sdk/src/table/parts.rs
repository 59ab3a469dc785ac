//! What arrives at a sink, cluster by cluster.

use crate::error::DriverResult;
use crate::extent::Extent;
use alloc::vec::Vec;
use core::ops::Range;

/// A disk that is cut into clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
}

/// What arrives for one cluster: parts of extents, ascending.
#[derive(Clone, Debug, Default)]
pub struct ClusterParts {
    /// The number of the cluster.
    pub cluster: u64,
    /// The parts, none of which reaches beyond the cluster.
    pub parts: Vec<Extent>,
}

/// All that arrives for a cluster, taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Zeroes, and no data.
    pub zero: bool,
    /// All of the cluster, as far as the disk goes.
    pub whole: bool,
}

/// What arrives next.
#[derive(Debug)]
pub enum Arriving<'a> {
    /// Zeroes, for all of these clusters.
    Zeroes(Range<u64>),
    /// Anything for a cluster.
    Cluster(&'a ClusterParts),
}

/// What is done with what arrives next; `true` for zeroes that are dealt with. Otherwise their clusters follow one by one.
pub type EachCluster<'a> = &'a mut dyn FnMut(Arriving<'_>) -> DriverResult<bool>;

impl ClusterParts {
    /// What arrives at a disk, taken together.
    #[must_use]
    pub fn arrival(&self, disk: Disk) -> Arrival {
        let range = disk.range(self.cluster);
        let covered = self.parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.length));
        Arrival { zero: self.parts.iter().all(Extent::is_zero), whole: covered >= range.end - range.start }
    }

    fn hand_over(&mut self, each: EachCluster<'_>) -> DriverResult<()> {
        if !self.parts.is_empty() {
            each(Arriving::Cluster(self))?;
            self.parts.clear();
        }
        Ok(())
    }
}

impl Disk {
    /// The guest bytes of a cluster: fewer than a cluster's at the end of the disk, none behind it.
    #[must_use]
    pub fn range(self, cluster: u64) -> Range<u64> {
        let start = cluster.saturating_mul(self.cluster);
        start.min(self.size)..start.saturating_add(self.cluster).min(self.size)
    }

    /// Hand what the extents touch to `each`, in its order: each cluster once, with all that the extents have of it.
    ///
    /// Zeroes may arrive for a disk of terabytes, and mostly where nothing is. So where they cover `span` clusters, from a
    /// multiple of that on, `each` is shown these at once: the clusters of an L2 table, for one.
    ///
    /// # Errors
    /// Those of `each`; [`BackingTooSmall`](instar_guest_abi::ErrorCode::BackingTooSmall) for an extent past the end of the
    /// disk; [`InternalOverflow`](instar_guest_abi::ErrorCode::InternalOverflow) for clusters of 0 bytes, or a span of none.
    pub fn each_cluster(self, span: u64, extents: &[Extent], each: EachCluster<'_>) -> DriverResult<()> {
        let coverage = self.cluster.saturating_mul(span);
        let mut gathered = ClusterParts::default();
        for extent in extents {
            extent.end_within(self.size)?;
            for part in extent.blocks(coverage)? {
                let start = part.guest_offset - part.guest_offset % coverage;
                if part.is_zero() && part.length == coverage.min(self.size.saturating_sub(start)) {
                    gathered.hand_over(each)?;
                    if each(Arriving::Zeroes(start / self.cluster..part.end().div_ceil(self.cluster)))? {
                        continue;
                    }
                }
                for part in part.blocks(self.cluster)? {
                    let cluster = part.guest_offset / self.cluster;
                    if cluster != gathered.cluster {
                        gathered.hand_over(each)?;
                    }
                    gathered.cluster = cluster;
                    gathered.parts.push(part);
                }
            }
        }
        gathered.hand_over(each)
    }
}
