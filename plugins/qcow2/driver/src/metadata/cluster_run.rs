//! Host clusters that follow each other.

use instar_qcow2_format::{ClusterSize, HostCluster, HostOffset};

/// Clusters that follow each other in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterRun {
    /// The first cluster.
    pub start: HostCluster,
    /// How many.
    pub count: u64,
}

impl ClusterRun {
    /// The clusters of a structure of `bytes` bytes that begins at `offset`, which is the start of a cluster.
    #[must_use]
    pub fn of(size: ClusterSize, offset: HostOffset, bytes: u64) -> Self {
        Self { start: size.host_cluster(offset), count: size.count_for(bytes) }
    }

    /// The cluster after the last one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.0.saturating_add(self.count)
    }

    /// Each of them, ascending.
    pub fn clusters(&self) -> impl Iterator<Item = HostCluster> + Clone + use<> {
        (self.start.0..self.end()).map(HostCluster)
    }
}
