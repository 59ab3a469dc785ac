//! What is asked of a commit.

use crate::devices::Cache;
use crate::operation::Settings;
use std::path::PathBuf;

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
    /// Stop before the first change.
    pub dry_run: bool,
    /// Stop there, too, and plan as if a block device that is committed into were as long as the plan makes it.
    pub measure: bool,
    /// Let a smaller backing grow to the overlay's virtual size.
    pub resize_backing: bool,
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
        self.dry_run || self.measure
    }
}
