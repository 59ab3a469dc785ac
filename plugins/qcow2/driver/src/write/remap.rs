//! Changes of L2 entries that wait for their data.

use instar_qcow2_format::{GuestCluster, HostOffset, L2Entry, Subclusters};

/// The change of an L2 entry.
pub(crate) struct Remap {
    pub(crate) cluster: GuestCluster,
    pub(crate) entry: u64,
    /// The second half of an extended entry. Both halves stand in one sector, which reaches the disk whole.
    pub(crate) bitmap: Option<u64>,
}

impl Remap {
    pub(crate) fn standard(cluster: GuestCluster, entry: L2Entry) -> Self {
        Self { cluster, entry: entry.encode(), bitmap: None }
    }

    pub(crate) fn extended(cluster: GuestCluster, host: Option<(HostOffset, bool)>, subclusters: Subclusters) -> Self {
        let (entry, bitmap) = subclusters.encode(host);
        Self { cluster, entry, bitmap: Some(bitmap) }
    }
}
