//! Free clusters within the file of a backing, to be used again before the file grows.
//!
//! A refcount of 0 says that a cluster is free; an image that somebody damaged may say so of data. Appending never
//! overwrites anything, using a cluster again does. So clusters are only taken if no table of the image refers to any of
//! them, which costs a walk over all L2 tables (see `cross_check`). At the least doubt the
//! file grows instead.

use crate::image::Image;
use crate::metadata::cluster_run::ClusterRun;
use crate::metadata::map::MetadataMap;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostCluster;

/// Clusters that are looked at for each one that is wanted, and at all.
const LOOK_FOR_EACH: u64 = 64;
const LOOK_AT_LEAST: u64 = 1 << 16;
const LOOK_AT_MOST: u64 = 1 << 20;
/// Runs that are remembered, at most: 1 MiB.
const MAX_RUNS: usize = 1 << 16;

/// Free clusters, ascending.
#[derive(Debug, Default)]
pub struct FreeClusters {
    runs: Vec<ClusterRun>,
    /// Index of the first run that was not handed out.
    next: usize,
}

impl FreeClusters {
    /// Look for `wanted` clusters below cluster `limit` that have refcount 0 and are no metadata. There may be fewer, or
    /// none. Whether they are free, a walk over all L2 tables has to say: see
    /// `cross_check`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn find(
        io: &mut dyn BlockIo,
        image: &Image,
        refcounts: &mut Refcounts,
        metadata: &MetadataMap,
        wanted: u64,
        limit: HostCluster,
    ) -> DriverResult<Self> {
        match Self::with_refcount_0(io, image, refcounts, metadata, wanted, limit) {
            // Corruption in a part of the image that the commit does not touch: better not to overwrite anything.
            Err(error) if error.code == image.corrupt_code() => Ok(Self::default()),
            other => other,
        }
    }

    /// How many clusters there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.runs.iter().skip(self.next).map(|run| run.count).sum()
    }

    /// The next clusters, `count` at most; `None` once all were handed out.
    pub fn take(&mut self, count: u64) -> Option<ClusterRun> {
        let run = self.runs.get_mut(self.next).filter(|_| count > 0)?;
        let taken = ClusterRun { start: run.start, count: run.count.min(count) };
        run.start.0 += taken.count;
        run.count -= taken.count;
        self.next += usize::from(run.count == 0);
        Some(taken)
    }

    fn with_refcount_0(
        io: &mut dyn BlockIo,
        image: &Image,
        refcounts: &mut Refcounts,
        metadata: &MetadataMap,
        wanted: u64,
        limit: HostCluster,
    ) -> DriverResult<Self> {
        // Whole clusters of the file that a refcount block describes.
        let end = (image.file_length >> image.cluster_size().bits()).min(limit.0);
        let end = end.min(wanted.saturating_mul(LOOK_FOR_EACH).clamp(LOOK_AT_LEAST, LOOK_AT_MOST));
        let mut found = Self::default();
        let (mut at, mut count) = (0, 0);
        while at < end && count < wanted {
            let until = end.min(at + CLUSTERS_PER_LOAD as u64);
            refcounts.table.shrink(CLUSTERS_PER_LOAD);
            refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
            refcounts.load(io, image, (at..until).map(HostCluster))?;
            for cluster in (at..until).map(HostCluster) {
                let described = refcounts.block(image, refcounts.locate(cluster).0, |_| true)?.is_some();
                if count == wanted || !described || refcounts.get(image, cluster)? != 0 || metadata.contains(cluster) {
                    continue;
                }
                count += 1;
                match found.runs.last_mut() {
                    Some(run) if run.start.0 + run.count == cluster.0 => run.count += 1,
                    _ => found.runs.push(ClusterRun { start: cluster, count: 1 }),
                }
                if found.runs.len() == MAX_RUNS {
                    return Ok(found);
                }
            }
            at = until;
        }
        Ok(found)
    }

    /// Whether a cluster is one of them.
    #[must_use]
    pub fn contains(&self, cluster: HostCluster) -> bool {
        let after = self.runs.partition_point(|run| run.start <= cluster);
        after.checked_sub(1).and_then(|i| self.runs.get(i)).is_some_and(|run| cluster.0 - run.start.0 < run.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_handed_out_once_and_in_order() {
        let run = |start, count| ClusterRun { start: HostCluster(start), count };
        let mut free = FreeClusters { runs: alloc::vec![run(3, 2), run(9, 5)], next: 0 };
        assert_eq!(free.count(), 7);
        assert!([3, 4, 9, 13].into_iter().all(|c| free.contains(HostCluster(c))));
        assert!([0, 2, 5, 8, 14].into_iter().all(|c| !free.contains(HostCluster(c))));
        assert_eq!(free.take(0), None);
        assert_eq!([free.take(1), free.take(9), free.take(3)], [Some(run(3, 1)), Some(run(4, 1)), Some(run(9, 3))]);
        assert_eq!(free.count(), 2);
        assert_eq!([free.take(9), free.take(1)], [Some(run(12, 2)), None]);
    }
}
