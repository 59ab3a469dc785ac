//! The extents that arrive at a sink, cut into clusters.

use crate::error::DriverResult;
use crate::extent::Extent;
use alloc::vec::Vec;
use core::ops::Range;

/// The geometry of a disk: its size and that of its clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Size of a cluster in bytes.
    pub cluster: u64,
}

/// The parts of extents that arrive for one cluster, ascending.
#[derive(Clone, Debug, Default)]
pub struct ClusterParts {
    /// The number of the cluster.
    pub cluster: u64,
    /// The parts, none of which reaches beyond the cluster.
    pub parts: Vec<Extent>,
}

/// A summary of the parts that arrive for a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Whether all parts are zeroes.
    pub zero: bool,
    /// Whether the parts cover the whole cluster, up to the end of the disk.
    pub whole: bool,
}

/// The next piece that [`Disk::each_cluster`] passes on.
#[derive(Debug)]
pub enum Arriving<'a> {
    /// Zeroes that cover all of these clusters.
    Zeroes(Range<u64>),
    /// All parts for one cluster.
    Cluster(&'a ClusterParts),
}

/// Callback of [`Disk::each_cluster`]. It returns `true` if it has dealt with [`Arriving::Zeroes`]; otherwise their clusters
/// follow one by one.
pub type EachCluster<'a> = &'a mut dyn FnMut(Arriving<'_>) -> DriverResult<bool>;

impl ClusterParts {
    /// Summarize the parts.
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
