//! What comes of a commit.

use crate::devices::Statistics;
use crate::operation::Timing;
use crate::sandbox::Report;
use instar_guest_protocol::commit::Plan;
use serde::{Serialize, Serializer};
use std::path::{Path, PathBuf};

/// How a commit went. What is serialized is the JSON of `docs/commit.md`.
#[derive(Clone, Debug, Serialize)]
pub struct CommitOutcome {
    /// Absolute path of the overlay.
    #[serde(serialize_with = "as_text")]
    pub overlay: PathBuf,
    /// The same as the operator gave it.
    #[serde(skip)]
    pub overlay_given: PathBuf,
    /// Its format.
    pub overlay_format: String,
    /// Absolute path of the backing.
    #[serde(serialize_with = "as_text")]
    pub backing: PathBuf,
    /// Its format.
    pub backing_format: String,
    /// Overlay clusters that were committed, zero clusters included.
    pub clusters_committed: u64,
    /// Their guest-visible bytes.
    pub bytes_committed: u64,
    /// Overlay clusters that were dropped by emptying it.
    pub overlay_clusters_cleared: u64,
    /// The layers between overlay and backing: they read differently afterwards, because the image below them changes.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "all_as_text")]
    pub stale: Vec<PathBuf>,
    /// What the operator should know, each one line that names a file. The observer had them before the first change.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// What the commit would mean for the backing, if nothing was changed, as asked.
    #[serde(flatten)]
    pub preview: Option<Preview>,
    /// The virtual size in bytes to which the backing grows, if it does.
    #[serde(skip)]
    pub backing_grows_to: Option<u64>,
    /// What the virtual machine did.
    #[serde(skip)]
    pub run: GuestRun,
    /// How long each part took.
    #[serde(skip)]
    pub timing: Timing,
}

/// What the virtual machine did.
#[derive(Clone, Debug, Default)]
pub struct GuestRun {
    /// The runner's report.
    pub report: Report,
    /// What the devices moved.
    pub statistics: Statistics,
}

/// What a commit means for the space of the backing's file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Preview {
    /// Nothing was changed.
    pub dry_run: bool,
    /// How long the backing's files become, together, in bytes, at most.
    pub backing_length_bytes: u64,
    /// Bytes by which the backing's file gets longer, at most.
    pub backing_growth_bytes: u64,
    /// Bytes that it takes of the disk besides what it has, at most: more than it grows by, where it has holes.
    pub backing_space_bytes: u64,
    /// Bytes that are free for this user; `None` for a block device, and where the file system does not say.
    pub free_bytes: Option<u64>,
}

impl Preview {
    /// What a plan means for a backing whose files are `length` bytes long, take `taken` bytes of the disk (`None` for a
    /// block device), and have clusters of so many bytes. What is committed as zeroes counts like data: only the write says
    /// how much of it can stay a hole.
    #[must_use]
    pub fn of(plan: &Plan, length: u64, taken: Option<u64>, cluster: u64) -> Self {
        let metadata = plan.new_metadata_clusters.saturating_mul(cluster);
        let written = plan.bytes.max(plan.new_data_clusters.saturating_mul(cluster)).saturating_add(metadata);
        let holes = |taken: u64| plan.backing_final_length.max(length).saturating_sub(taken);
        Self {
            dry_run: true,
            backing_length_bytes: plan.backing_final_length.max(length),
            backing_growth_bytes: plan.backing_final_length.saturating_sub(length),
            backing_space_bytes: taken.map_or(0, |taken| holes(taken).min(written)),
            free_bytes: None,
        }
    }
}

/// A path as text: bytes that are no UTF-8 are shown as replacement characters.
fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

fn all_as_text<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_with_holes_takes_more_than_it_grows_by() {
        let plan = |bytes, end| Plan { bytes, backing_final_length: end, ..Plan::default() };
        let of = |plan, taken| {
            let preview = Preview::of(&plan, 1000, taken, 0);
            (preview.backing_growth_bytes, preview.backing_space_bytes)
        };
        assert_eq!(of(plan(300, 1000), Some(0)), (0, 300), "a thin raw image");
        assert_eq!(of(plan(300, 1000), Some(900)), (0, 100), "no more than there are holes");
        assert_eq!(of(plan(300, 1300), Some(1000)), (300, 300));
        assert_eq!(of(plan(300, 1000), None), (0, 0), "a block device");
    }
}
