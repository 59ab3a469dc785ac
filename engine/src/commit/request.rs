//! The request for a commit.

use crate::devices::Cache;
use crate::operation::Settings;
use std::path::PathBuf;

/// The extent of a commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CommitMode {
    /// The whole commit.
    #[default]
    Whole,
    /// Everything before the first change.
    DryRun,
    /// The same, with a target block device that counts as long enough for the plan.
    Measure,
}

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct CommitRequest {
    /// The overlay.
    pub overlay: PathBuf,
    /// The overlay's format, if the operator names one.
    pub format: Option<String>,
    /// The image to commit into, if the operator names it.
    pub base: Option<PathBuf>,
    /// The format of the image to commit into, if the operator names it.
    pub base_format: Option<String>,
    /// Whether the overlay keeps its content.
    pub keep_overlay: bool,
    /// Whether to overwrite the overlay's clusters, durably, before their space is given back.
    pub wipe: bool,
    /// Whether to read back all written data before anything depends on it.
    pub verify: bool,
    /// Whether to hash the disk before the commit and the target's afterwards, and compare the two.
    pub digest: bool,
    /// Whether to commit data that is all zeroes as zeroes.
    pub detect_zeroes: bool,
    /// Whether to remove the overlay's file at the end.
    pub delete_overlay: bool,
    /// The part of the commit to do.
    pub mode: CommitMode,
    /// Whether to change the target completely or not at all.
    pub atomic: bool,
    /// The old target's name in the target's directory, if it is kept; only with `atomic`.
    pub keep_backup: Option<PathBuf>,
    /// Whether a smaller backing grows to the overlay's virtual size.
    pub resize_backing: bool,
    /// Whether to merge the bitmaps of the committed layers into those of the target.
    pub bitmaps: bool,
    /// Children of the overlay to relink to the target.
    pub relink: Vec<PathBuf>,
    /// Directories in which every child of the overlay is relinked.
    pub relink_in: Vec<PathBuf>,
    /// Whether to commit although that damages other images on the target.
    pub ignore_siblings: bool,
    /// The maximum of bytes that move per second; 0 for no limit.
    pub rate_limit: u64,
    /// The promises of flushes and writes.
    pub cache: Cache,
    /// Plugins, directories, and the time to wait for a lock.
    pub settings: Settings,
}

impl CommitRequest {
    /// Whether this is a request to change nothing.
    #[must_use]
    pub fn only_plans(&self) -> bool {
        self.mode != CommitMode::Whole
    }

    /// Whether the overlay keeps its content. An overlay that is deleted need not be emptied before, except with
    /// `wipe`, and except with children to relink: after an interruption, only the empty overlay tells a second run
    /// that an image on the target was its child.
    #[must_use]
    pub fn keeps_content(&self) -> bool {
        self.keep_overlay || (self.delete_overlay && !self.wipe && !self.relinks())
    }

    /// Whether children of the overlay are relinked to the target.
    #[must_use]
    pub fn relinks(&self) -> bool {
        !self.relink.is_empty() || !self.relink_in.is_empty()
    }
}
