//! What is asked of a commit.

use crate::devices::Cache;
use crate::operation::Settings;
use std::path::PathBuf;

/// How far a commit goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CommitMode {
    /// To its end.
    #[default]
    Whole,
    /// To the moment before the first change.
    DryRun,
    /// To the same moment; a block device that is committed into counts as as long as the plan makes it.
    Measure,
}

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct CommitRequest {
    /// The overlay.
    pub overlay: PathBuf,
    /// The overlay's format, if the operator names it.
    pub format: Option<String>,
    /// The image to commit into, if the operator names it.
    pub base: Option<PathBuf>,
    /// The format of the image to commit into, if the operator names it.
    pub base_format: Option<String>,
    /// Leave the overlay's content in place.
    pub keep_overlay: bool,
    /// Overwrite what the overlay gives back, durably, before it is given back.
    pub wipe: bool,
    /// Read back what was written, before anything depends on it.
    pub verify: bool,
    /// Hash the disk before the commit, and the target's afterwards, and compare the two.
    pub digest: bool,
    /// Commit data that is all zeroes as zeroes.
    pub detect_zeroes: bool,
    /// Remove the overlay's file at the end.
    pub delete_overlay: bool,
    /// How far it goes.
    pub mode: CommitMode,
    /// Change the target whole or not at all.
    pub atomic: bool,
    /// The name, in the directory of the target, that the old target keeps; only with `atomic`.
    pub keep_backup: Option<PathBuf>,
    /// Let a smaller backing grow to the overlay's virtual size.
    pub resize_backing: bool,
    /// Merge the bitmaps of what is committed into those of the target.
    pub bitmaps: bool,
    /// Children of the overlay that are to name the image that is committed into.
    pub relink: Vec<PathBuf>,
    /// Directories in which every child of the overlay is to name it.
    pub relink_in: Vec<PathBuf>,
    /// Commit although other images are on what is changed, which damages them.
    pub ignore_siblings: bool,
    /// Bytes per second that are moved at most; 0 for no limit.
    pub rate_limit: u64,
    /// What flushes and writes promise.
    pub cache: Cache,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

impl CommitRequest {
    /// Whether nothing is to be changed.
    #[must_use]
    pub fn only_plans(&self) -> bool {
        self.mode != CommitMode::Whole
    }

    /// Whether the overlay keeps its content. One that is deleted need not be emptied before, unless that is to be overwritten.
    /// With children that are relinked it is emptied all the same: that alone tells a second run, after one that was cut short,
    /// that an image on the target was a child of the overlay.
    #[must_use]
    pub fn keeps_content(&self) -> bool {
        self.keep_overlay || (self.delete_overlay && !self.wipe && !self.relinks())
    }

    /// Whether children of the overlay are to name the image that is committed into.
    #[must_use]
    pub fn relinks(&self) -> bool {
        !self.relink.is_empty() || !self.relink_in.is_empty()
    }
}
