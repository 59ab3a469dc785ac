//! What a commit did.

use std::path::PathBuf;

/// What a commit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitRunResult {
    /// Absolute path of the overlay.
    pub overlay: PathBuf,
    /// Its format.
    pub overlay_format: String,
    /// Absolute path of the backing.
    pub backing: PathBuf,
    /// Its format.
    pub backing_format: String,
    /// Clusters of the overlay that were committed.
    pub clusters_committed: u64,
    /// Guest-visible bytes of them.
    pub bytes_committed: u64,
    /// Clusters that emptying the overlay dropped.
    pub overlay_clusters_cleared: u64,
}
