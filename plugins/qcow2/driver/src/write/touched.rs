//! Which clusters of a backing a commit will touch.

use crate::references::cluster_set::ClusterSet;
use instar_qcow2_format::HostCluster;

/// Memory for the set of clusters that are overwritten in place, in bytes.
const TOUCHED_BUDGET: usize = 8 << 20;

/// The clusters of a backing that a commit will touch, as far as planning has come.
pub(crate) struct Touched {
    /// Clusters that are overwritten.
    pub(crate) data: ClusterSet,
    /// Host clusters of compressed ones, which are replaced.
    pub(crate) compressed: ClusterSet,
    /// L2 tables that are changed, or that lose a reference.
    pub(crate) tables: ClusterSet,
    /// On a device that keeps its length: the clusters that will be allocated.
    pub(crate) fresh: ClusterSet,
}

impl Touched {
    /// None.
    pub(crate) fn new() -> Self {
        let set = |budget| ClusterSet::new(HostCluster(0), budget);
        Self {
            data: set(TOUCHED_BUDGET),
            compressed: set(TOUCHED_BUDGET),
            tables: set(TOUCHED_BUDGET / 4),
            fresh: set(TOUCHED_BUDGET),
        }
    }

    /// Whether nothing is changed or freed.
    pub(crate) fn nothing(&self) -> bool {
        self.data.is_empty() && self.compressed.is_empty() && self.tables.is_empty()
    }

    /// Whether a cluster may be one that is changed: certainly not, if this says no.
    pub(crate) fn may_contain(&self, cluster: HostCluster) -> bool {
        self.data.may_contain(cluster) || self.compressed.may_contain(cluster)
    }

    /// Whether any cluster of a [chunk](ClusterSet::chunk_of) may be changed or allocated.
    pub(crate) fn may_reach(&self, chunk: u64) -> bool {
        [&self.data, &self.compressed, &self.fresh].iter().any(|set| set.may_reach(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_changed_is_told_from_what_is_new() {
        let mut touched = Touched::new();
        assert!(touched.nothing());
        touched.fresh.insert(HostCluster(7));
        assert!(touched.nothing() && !touched.may_contain(HostCluster(7)));
        assert!(touched.may_reach(ClusterSet::chunk_of(HostCluster(7))));
        touched.tables.insert(HostCluster(9));
        assert!(!touched.nothing() && !touched.may_contain(HostCluster(9)));
        touched.compressed.insert(HostCluster(1 << 20));
        assert!(touched.may_contain(HostCluster(1 << 20)) && !touched.may_contain(HostCluster(7)));
        assert!(touched.may_reach(ClusterSet::chunk_of(HostCluster(1 << 20))));
    }
}
