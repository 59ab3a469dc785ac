//! What arrives, cluster by cluster.

use crate::decide::Arrival;
use crate::image::Image;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{DriverResult, Extent};

/// The disk, as extents are cut.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
}

/// Entries of the BAT that are looked at at once where nothing but zeroes arrives.
const COVERAGE: u64 = 8192;

impl Shape {
    /// The disk of an image, with this size in bytes.
    pub fn of(image: &Image, size: u64) -> Self {
        Self { size, cluster: image.header.cluster_bytes() }
    }

    /// The guest bytes of a cluster: fewer than a cluster's at the end of the disk, none behind it.
    pub fn range(self, cluster: u64) -> Range<u64> {
        let start = cluster.saturating_mul(self.cluster);
        start.min(self.size)..start.saturating_add(self.cluster).min(self.size)
    }
}

/// What arrives for one cluster: parts of extents, ascending.
#[derive(Debug, Default)]
pub struct ClusterParts {
    pub cluster: u64,
    pub parts: Vec<Extent>,
}

/// What arrives next.
pub enum Arriving<'a> {
    /// Zeroes, for all of these clusters.
    Zeroes(Range<u64>),
    /// Anything for a cluster.
    Cluster(&'a ClusterParts),
}

/// What is done with it; `true` for zeroes that are dealt with. Otherwise their clusters follow.
pub type Each<'a> = &'a mut dyn FnMut(Arriving<'_>) -> DriverResult<bool>;

impl ClusterParts {
    /// What arrives, taken together.
    pub fn arrival(&self) -> Arrival {
        Arrival { zero: self.parts.iter().all(Extent::is_zero) }
    }

    fn hand_over(&mut self, each: Each<'_>) -> DriverResult<()> {
        if !self.parts.is_empty() {
            each(Arriving::Cluster(self))?;
            self.parts.clear();
        }
        Ok(())
    }

    /// Hand what the extents touch to `each`, in its order: each cluster once, with all that the extents have of it.
    ///
    /// # Errors
    /// Those of `each`; `BackingTooSmall` for an extent past the end of the disk.
    pub fn each(disk: Shape, extents: &[Extent], each: Each<'_>) -> DriverResult<()> {
        let mut gathered = Self::default();
        let coverage = disk.cluster.saturating_mul(COVERAGE);
        for extent in extents {
            extent.end_within(disk.size)?;
            for part in extent.blocks(coverage)? {
                let first = part.guest_offset / coverage * COVERAGE;
                let all = coverage.min(disk.size - first * disk.cluster);
                if part.is_zero() && part.length == all {
                    gathered.hand_over(each)?;
                    if each(Arriving::Zeroes(first..(first + COVERAGE).min(disk.size.div_ceil(disk.cluster))))? {
                        continue;
                    }
                }
                for part in part.blocks(disk.cluster)? {
                    let cluster = part.guest_offset / disk.cluster;
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
