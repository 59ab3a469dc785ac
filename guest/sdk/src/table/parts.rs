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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::{format, vec};
    use instar_guest_abi::ErrorCode;

    /// What arrives at a disk of 99 bytes in clusters of 10, three at once: zeroes in brackets, otherwise the cluster, the
    /// lengths of its parts, and what they are together.
    fn arriving(extents: &[Extent], takes_zeroes: bool) -> String {
        let disk = Disk { size: 99, cluster: 10 };
        let mut text = String::new();
        let mut each = |arriving: Arriving<'_>| {
            match arriving {
                Arriving::Zeroes(clusters) => text += &format!("[{}..{}] ", clusters.start, clusters.end),
                Arriving::Cluster(parts) => {
                    let lengths: Vec<u64> = parts.parts.iter().map(|part| part.length).collect();
                    let Arrival { zero, whole } = parts.arrival(disk);
                    let kind = [if zero { "0" } else { "" }, if whole { "!" } else { "" }].concat();
                    text += &format!("{}{kind}{lengths:?} ", parts.cluster);
                }
            }
            Ok(takes_zeroes)
        };
        disk.each_cluster(3, extents, &mut each).unwrap();
        text
    }

    #[test]
    fn each_cluster_comes_once_with_all_of_its_parts() {
        let extents = [Extent::data(5, 7, 1, 0), Extent::zero(12, 2), Extent::data(15, 5, 1, 9), Extent::zero(91, 8)];
        assert_eq!(arriving(&extents, true), "0[5] 1[2, 2, 5] 90[8] ");
        assert_eq!(arriving(&[Extent::zero(90, 9)], true), "[9..10] ");
        assert_eq!(arriving(&[Extent::zero(90, 9)], false), "[9..10] 90![9] ");
        assert_eq!(arriving(&[], true), "");
    }

    #[test]
    fn zeroes_over_a_span_come_at_once() {
        let extents = [Extent::data(20, 10, 1, 0), Extent::zero(30, 40), Extent::data(70, 1, 1, 0)];
        assert_eq!(arriving(&extents, true), "2![10] [3..6] 60![10] 7[1] ");
        assert_eq!(arriving(&extents, false), "2![10] [3..6] 30![10] 40![10] 50![10] 60![10] 7[1] ");
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        let code = |disk: Disk, span| {
            let result = disk.each_cluster(span, &[Extent::data(0, 11, 1, 0)], &mut |_| Ok(true));
            result.map_err(|error| error.code)
        };
        assert_eq!(code(Disk { size: 10, cluster: 10 }, 1), Err(ErrorCode::BackingTooSmall));
        assert_eq!(code(Disk { size: 11, cluster: 0 }, 1), Err(ErrorCode::InternalOverflow));
        assert_eq!(code(Disk { size: 11, cluster: 10 }, 0), Err(ErrorCode::InternalOverflow));
        assert_eq!(code(Disk { size: 11, cluster: u64::MAX }, 9), Ok(()));
        assert_eq!(
            vec![0..10, 90..99, 99..99, 99..99],
            [0, 9, 10, u64::MAX].map(|c| Disk { size: 99, cluster: 10 }.range(c))
        );
    }
}
