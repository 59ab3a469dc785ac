//! What of an image is to be mended, counted.

use super::rules::Rules;
use alloc::collections::BTreeSet;

/// What is to be mended.
#[derive(Debug)]
pub(crate) struct Mend {
    pub(super) rules: Rules,
    /// The refcount blocks to be made.
    pub(super) missing: BTreeSet<u64>,
    /// Refcounts that are too low and will be raised, and too high and will be lowered.
    pub(super) raised: u64,
    pub(super) lowered: u64,
    /// Refcounts of clusters behind the end of the file that are not 0: no leaks yet, but as soon as the file grows.
    pub(super) behind: u64,
    /// COPIED flags that contradict the refcount and will not, and all that change.
    pub(super) wrong_flags: u64,
    pub(super) flags: u64,
    /// Clusters that are kept although nothing that is known refers to them.
    pub(super) kept: u64,
    /// Corruption that stays.
    pub(super) left: u64,
    pub(super) clears_marks: bool,
    /// Entries of the active state for a cluster that another one names: one of the two is damaged, and has named a cluster that
    /// nothing names now.
    pub(super) doubtful: u64,
}

impl Mend {
    /// Nothing that follows these rules.
    pub(super) fn nothing(rules: Rules) -> Self {
        Self {
            rules,
            missing: BTreeSet::new(),
            raised: 0,
            lowered: 0,
            behind: 0,
            wrong_flags: 0,
            flags: 0,
            kept: 0,
            left: 0,
            clears_marks: false,
            doubtful: 0,
        }
    }
}
