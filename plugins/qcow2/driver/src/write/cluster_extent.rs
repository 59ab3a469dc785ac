//! Parts of extents, as they fall into the clusters of an image.

use instar_guest_sdk::Content;
use instar_qcow2_format::GuestCluster;

/// A part of an extent that falls into one cluster of the sink.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClusterExtent {
    pub(crate) cluster: GuestCluster,
    /// Byte offset within the cluster, and length in bytes.
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) content: Content,
}

impl ClusterExtent {
    /// Whether these are zeroes.
    pub(crate) fn is_zero(&self) -> bool {
        matches!(self.content, Content::Zero)
    }
}
