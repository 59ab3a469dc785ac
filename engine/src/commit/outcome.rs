//! The result of a commit.

use super::as_text::{optional_path_as_text, path_as_text, paths_as_text};
use super::atomic::AtomicWay;
use super::bitmaps::MergedBitmap;
use super::digest::DiskDigest;
use super::relinks::Relinked;
use crate::devices::Statistics;
use crate::operation::Timing;
use crate::sandbox::Report;
use instar_guest_protocol::commit::Plan;
use serde::Serialize;
use std::path::PathBuf;

/// The result of a commit. It serializes to the JSON of `docs/commit.md`.
#[derive(Clone, Debug, Serialize)]
pub struct CommitOutcome {
    /// Absolute path of the overlay.
    #[serde(serialize_with = "path_as_text")]
    pub overlay: PathBuf,
    /// The same as the operator gave it.
    #[serde(skip)]
    pub overlay_given: PathBuf,
    /// Its format.
    pub overlay_format: String,
    /// Absolute path of the backing.
    #[serde(serialize_with = "path_as_text")]
    pub backing: PathBuf,
    /// Its format.
    pub backing_format: String,
    /// Overlay clusters that were committed, zero clusters included.
    pub clusters_committed: u64,
    /// Their guest-visible bytes.
    pub bytes_committed: u64,
    /// Overlay clusters that were dropped by emptying it.
    pub overlay_clusters_cleared: u64,
    /// Bytes of the overlay that were overwritten before their space was given back; `None` without `--wipe`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay_bytes_wiped: Option<u64>,
    /// Guest-visible bytes that were read back and matched, 0 in a dry run; `None` without `--verify`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified_bytes: Option<u64>,
    /// The digests of the disk; `None` without `--digest`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<DiskDigest>,
    /// Whether the overlay's file was removed; `None` without `--delete-overlay`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay_deleted: Option<bool>,
    /// The way in which the old target was kept, or would be; `None` without `--atomic`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub atomic: Option<AtomicWay>,
    /// Absolute path of the old backing, with `--keep-backup`; `None` in a dry run.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "optional_path_as_text")]
    pub backup: Option<PathBuf>,
    /// The layers between overlay and backing: they read differently afterwards, because the image below them changes.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "paths_as_text")]
    pub stale: Vec<PathBuf>,
    /// The overlay's children that name the backing now, or would after a commit; `None` if none were to be relinked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relinked: Option<Vec<Relinked>>,
    /// The bitmaps of the committed layers with their fates, also in a dry run; `None` without `--bitmaps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<Vec<MergedBitmap>>,
    /// Warnings for the operator, each one line that names a file. The observer had them before the first change.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The effect of the commit on the backing's space, in a dry run.
    #[serde(flatten)]
    pub preview: Option<Preview>,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// The virtual size in bytes to which the backing grows, if it does.
    #[serde(skip)]
    pub backing_grows_to: Option<u64>,
    /// The guest's work.
    #[serde(skip)]
    pub run: GuestRun,
    /// The duration of each part.
    #[serde(skip)]
    pub timing: Timing,
}

/// The guest's work.
#[derive(Clone, Debug, Default)]
pub struct GuestRun {
    /// The runner's report.
    pub report: Report,
    /// The bytes that the devices moved.
    pub statistics: Statistics,
}

/// The effect of a commit on the space of the backing's file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Preview {
    /// Whether it was a dry run, which changes nothing.
    pub dry_run: bool,
    /// Maximum length of all the backing's files together, in bytes.
    pub backing_length_bytes: u64,
    /// Maximum growth of the backing's file, in bytes.
    pub backing_growth_bytes: u64,
    /// Maximum of additional disk space that it takes, in bytes: more than its growth, if it has holes.
    pub backing_space_bytes: u64,
    /// Bytes that are free for this user; `None` for a block device, and if the file system does not report them.
    pub free_bytes: Option<u64>,
    /// Maximum of additional disk space that an undo log takes, in bytes; `None` without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undo_log_bytes: Option<u64>,
    /// Bytes that are free where the undo log lies, if that is on another file system; `None` otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undo_free_bytes: Option<u64>,
    /// Bytes that may be missing, at most; `None` where there is room for everything, and where nobody says how much there is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lacking_bytes: Option<u64>,
}

/// The units in which space is allocated, in bytes; 0 or 1 if it is not allocated in units.
#[derive(Clone, Copy, Debug, Default)]
pub struct Units {
    /// Clusters of the overlay.
    pub overlay: u64,
    /// Clusters of the backing.
    pub backing: u64,
    /// Blocks of the backing's file system.
    pub block: u64,
}

/// The clusters that a plan allocates, and the pieces that it writes: one for each of these, and one for each committed
/// cluster.
pub(super) fn pieces(plan: &Plan) -> (u64, u64) {
    let allocated = plan.new_data_clusters.saturating_add(plan.new_metadata_clusters);
    (allocated, plan.clusters.saturating_add(allocated))
}

impl Units {
    /// The disk space that the writes of a plan may take beyond their own length, in bytes: at ends that do not meet a
    /// block's boundary, and in tables of the backing that are holes so far.
    fn waste(&self, plan: &Plan) -> u64 {
        /// An entry of a mapping table, of its copy, and of a refcount block.
        const TABLES: u64 = 3;
        let (has_tables, block) = (self.backing > 1, self.block.max(1));
        let whole = |cluster: u64| cluster <= 1 || cluster.is_multiple_of(block);
        let (allocated, pieces) = pieces(plan);
        let cut = if whole(self.overlay) && whole(self.backing) { 0 } else { pieces };
        let tables = if has_tables { plan.clusters.saturating_mul(TABLES) } else { 0 };
        // A format may put its clusters where it likes, not only at multiples of their size.
        let moved = if has_tables { allocated } else { 0 };
        cut.saturating_add(tables).saturating_add(moved).saturating_mul(block)
    }

    /// The disk space that the file system itself may need to find the pieces, in bytes: ext4 counts the blocks of an
    /// extent tree, with 340 extents in each, as the file's own.
    fn index(&self, plan: &Plan) -> u64 {
        const EXTENTS: u64 = 170;
        match (pieces(plan).1, self.block) {
            (0, _) | (_, 0 | 1) => 0,
            (pieces, block) => (pieces / EXTENTS + 2).saturating_mul(block),
        }
    }
}

impl Preview {
    /// Compute the effect of a plan on a backing whose files are `length` bytes long, and take `taken` bytes of the
    /// disk (`None` for a block device). Committed zeroes count like data, because only the write shows how many of
    /// them can stay holes.
    #[must_use]
    pub fn of(plan: &Plan, length: u64, taken: Option<u64>, units: &Units) -> Self {
        let cluster = units.backing;
        // A last cluster that is cut short stays so if nothing is written.
        let nothing = plan.bytes == 0 && plan.new_data_clusters == 0 && plan.new_metadata_clusters == 0;
        let same = nothing && plan.backing_final_length.saturating_sub(length) < cluster;
        let end = if same { length } else { plan.backing_final_length.max(length) };
        let metadata = plan.new_metadata_clusters.saturating_mul(cluster);
        let written = plan.bytes.max(plan.new_data_clusters.saturating_mul(cluster)).saturating_add(metadata);
        let written = written.saturating_add(units.waste(plan));
        let holes = |taken: u64| end.next_multiple_of(units.block.max(1)).saturating_sub(taken);
        Self {
            dry_run: true,
            backing_length_bytes: end,
            backing_growth_bytes: end - length,
            backing_space_bytes: taken.map_or(0, |taken| holes(taken).min(written).saturating_add(units.index(plan))),
            free_bytes: None,
            undo_log_bytes: None,
            undo_free_bytes: None,
            lacking_bytes: None,
        }
    }

    /// The same, with what is missing.
    #[must_use]
    pub fn with_lack(self) -> Self {
        let log = self.undo_log_bytes.unwrap_or(0);
        let beyond = |free: Option<u64>, needed: u64| free.map_or(0, |free| needed.saturating_sub(free));
        let lacking = match self.undo_free_bytes {
            // The log lies elsewhere.
            Some(_) => {
                beyond(self.free_bytes, self.backing_space_bytes).saturating_add(beyond(self.undo_free_bytes, log))
            }
            None => beyond(self.free_bytes, self.backing_space_bytes.saturating_add(log)),
        };
        Self { lacking_bytes: (lacking > 0).then_some(lacking), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(plan: Plan, taken: Option<u64>, units: Units) -> (u64, u64) {
        let preview = Preview::of(&plan, 1000, taken, &units);
        (preview.backing_growth_bytes, preview.backing_space_bytes)
    }

    #[test]
    fn a_target_with_holes_takes_more_than_it_grows_by() {
        let plan = |bytes, end| Plan { bytes, backing_final_length: end, ..Plan::default() };
        let of = |plan, taken| of(plan, taken, Units::default());
        assert_eq!(of(plan(300, 1000), Some(0)), (0, 300), "a thin raw image");
        assert_eq!(of(plan(300, 1000), Some(900)), (0, 100), "no more than there are holes");
        assert_eq!(of(plan(300, 1300), Some(1000)), (300, 300));
        assert_eq!(of(plan(300, 1000), None), (0, 0), "a block device");
    }

    #[test]
    fn what_is_no_whole_block_takes_one_all_the_same() {
        let plan = Plan { clusters: 3, bytes: 3 * 512, backing_final_length: 1 << 20, ..Plan::default() };
        let thin = Units { overlay: 512, backing: 1, block: 4096 };
        let space = of(plan, Some(0), thin).1;
        assert!(space >= 3 * 4096, "{space}");
        let whole = Plan { bytes: 3 << 16, ..plan };
        let aligned = of(whole, Some(0), Units { overlay: 1 << 16, ..thin }).1;
        assert_eq!(aligned, (3 << 16) + 2 * 4096, "blocks are written whole");
        let tables = of(whole, Some(0), Units { overlay: 1 << 16, backing: 1 << 16, block: 4096 }).1;
        assert!(tables >= (3 << 16) + 3 * 3 * 4096, "{tables}: tables may be holes");
    }

    #[test]
    fn what_may_be_missing_is_said() {
        let preview = Preview { backing_space_bytes: 700, free_bytes: Some(1000), ..Preview::default() };
        assert_eq!(preview.with_lack().lacking_bytes, None);
        let beside = Preview { undo_log_bytes: Some(400), ..preview };
        assert_eq!(beside.with_lack().lacking_bytes, Some(100), "both take of one file system");
        assert_eq!(Preview { undo_free_bytes: Some(400), ..beside }.with_lack().lacking_bytes, None);
        assert_eq!(Preview { undo_free_bytes: Some(390), ..beside }.with_lack().lacking_bytes, Some(10));
        assert_eq!(Preview { free_bytes: None, ..beside }.with_lack().lacking_bytes, None, "nobody says");
    }

    #[test]
    fn nothing_to_commit_is_nothing_to_grow() {
        let units = Units { overlay: 512, backing: 512, block: 4096 };
        assert_eq!(of(Plan { backing_final_length: 1024, ..Plan::default() }, Some(0), units), (0, 0));
        let grown = Plan { backing_final_length: 5000, ..Plan::default() };
        assert_eq!(of(grown, Some(0), units).0, 4000, "but a larger disk may be");
    }
}
