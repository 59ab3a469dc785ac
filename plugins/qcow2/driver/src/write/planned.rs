//! What planning has found out so far.

use crate::metadata::map::MetadataMap;
use crate::references::cluster_set::ClusterSet;
use instar_qcow2_format::{GuestCluster, HostCluster};

/// Memory for the set of clusters that are overwritten in place, in bytes.
const TOUCHED_BUDGET: usize = 8 << 20;

/// What planning has found out so far.
pub(crate) struct Planned {
    pub(crate) metadata: Option<MetadataMap>,
    /// Clusters that are overwritten, and host clusters of compressed ones.
    pub(crate) touched: ClusterSet,
    pub(crate) touched_compressed: ClusterSet,
    /// L2 tables that are changed, or that lose a reference.
    pub(crate) touched_tables: ClusterSet,
    /// On a device that keeps its length: the clusters that will be allocated.
    pub(crate) fresh: ClusterSet,
    /// Guest bytes that are committed.
    pub(crate) committed: u64,
    /// L2 tables that were not looked at.
    pub(crate) unread_tables: u64,
    pub(crate) new_data: u64,
    pub(crate) new_tables: u64,
    /// Clusters of longer L1 and bitmap tables, which follow each other …
    pub(crate) new_runs: u64,
    /// … and the same with the refcount blocks that they may need.
    pub(crate) run_span: u64,
    /// The cluster at the old end of an image that grows, if it was looked at already.
    pub(crate) grown: Option<GuestCluster>,
    /// Index of the last L2 table that was looked at, and of the last one that will be new.
    pub(crate) last_table: Option<u64>,
    pub(crate) last_new_table: Option<u64>,
    pub(crate) last_cluster: Option<GuestCluster>,
}

impl Planned {
    /// Nothing.
    pub(crate) fn new() -> Self {
        Self {
            metadata: None,
            touched: ClusterSet::new(HostCluster(0), TOUCHED_BUDGET),
            touched_compressed: ClusterSet::new(HostCluster(0), TOUCHED_BUDGET),
            touched_tables: ClusterSet::new(HostCluster(0), TOUCHED_BUDGET / 4),
            fresh: ClusterSet::new(HostCluster(0), TOUCHED_BUDGET),
            committed: 0,
            unread_tables: 0,
            new_data: 0,
            new_tables: 0,
            new_runs: 0,
            run_span: 0,
            grown: None,
            last_table: None,
            last_new_table: None,
            last_cluster: None,
        }
    }

    /// Whether nothing is changed or freed.
    pub(crate) fn touches_nothing(&self) -> bool {
        self.touched.is_empty() && self.touched_compressed.is_empty() && self.touched_tables.is_empty()
    }

    /// Whether a cluster may be one that is changed: certainly not, if this says no.
    pub(crate) fn may_touch(&self, cluster: HostCluster) -> bool {
        self.touched.may_contain(cluster) || self.touched_compressed.may_contain(cluster)
    }
}
