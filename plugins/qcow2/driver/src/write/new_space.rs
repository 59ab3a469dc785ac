//! Clusters that were allocated, and that nothing durable refers to yet.

use crate::image::overflow;
use crate::metadata::cluster_run::ClusterRun;
use alloc::vec::Vec;
use instar_guest_sdk::DriverResult;
use instar_qcow2_format::HostCluster;

/// Clusters in the order in which they were reserved.
pub(crate) struct Reserved {
    pub(crate) clusters: Vec<HostCluster>,
    /// So many of them, the first ones, hold whatever was there before.
    pub(crate) stale: u64,
    pub(crate) taken: usize,
}

impl Reserved {
    pub(crate) fn next(&mut self) -> DriverResult<HostCluster> {
        let cluster = self.clusters.get(self.taken).copied();
        self.taken += 1;
        cluster.ok_or_else(|| overflow("the number of clusters to allocate"))
    }

    /// Those that do not read as zeroes, with their index.
    pub(crate) fn stale(&self) -> impl Iterator<Item = (usize, HostCluster)> + '_ {
        self.clusters.iter().copied().enumerate().take_while(|&(index, _)| (index as u64) < self.stale)
    }
}

/// What was allocated and is not referred to yet by anything that may be durable.
#[derive(Debug)]
pub(crate) struct NewSpace {
    /// Length of the file before, in bytes.
    pub(crate) length: u64,
    /// Clusters within it that were free.
    pub(crate) reused: Vec<ClusterRun>,
}
