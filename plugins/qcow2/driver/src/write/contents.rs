//! What clusters of a backing hold: what one had before a change, and where the bytes of a new one come from.

use instar_qcow2_format::{ClusterSize, CompressedRange, HostCluster, HostOffset};

/// What a cluster had before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Old {
    /// Nothing of its own.
    Nothing,
    /// A host cluster.
    Cluster(HostOffset),
    /// A compressed cluster with this descriptor.
    Compressed(u64),
}

impl Old {
    /// The host clusters to which there is one reference less without it.
    pub(crate) fn host_clusters(self, size: ClusterSize) -> impl Iterator<Item = HostCluster> {
        let (cluster, compressed) = match self {
            Self::Nothing => (None, None),
            Self::Cluster(offset) => (Some(size.host_cluster(offset)), None),
            Self::Compressed(descriptor) => (None, Some(CompressedRange::decode(descriptor, size))),
        };
        cluster.into_iter().chain(compressed.into_iter().flat_map(move |range| range.host_clusters(size)))
    }
}

/// Where the bytes of a new cluster come from that no piece covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// They are zero.
    Zero,
    /// From below the image.
    Below,
    /// From the cluster that was there, which a snapshot keeps.
    Cluster(HostOffset),
    /// From the compressed cluster that was there.
    Compressed(u64),
}
