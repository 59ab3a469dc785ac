//! What became of images that something was done with.

use instar_testkit::Disk;

/// How a pair ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// The host halves did not admit it.
    NotAdmitted,
    /// The guest refused it before the first change.
    Refused,
    /// It was done: committed, in a pair.
    Done,
    /// It failed after the first change: damage in what a commit verifies as it goes.
    FailedLater,
}

/// What became of a pair, or why it is a finding.
#[derive(Debug)]
pub struct Verdict {
    /// How it ended.
    pub ending: Ending,
    /// Whether the independent reader could compare what the images read as.
    pub compared: bool,
    /// Why it was refused or failed.
    pub failure: Option<String>,
    /// What must not be, with what was done to the images.
    pub finding: Option<String>,
    /// Requests that the commit made.
    pub requests: usize,
}

impl Verdict {
    /// That the host halves admit nothing.
    pub(super) const fn not_admitted() -> Self {
        Self { ending: Ending::NotAdmitted, compared: false, failure: None, finding: None, requests: 0 }
    }
}

/// The first sector of `range` that could be read before and reads differently now.
pub(super) fn differs(before: &Disk, now: &Disk, range: std::ops::Range<usize>) -> Option<usize> {
    range.into_iter().find(|&sector| {
        before.sector(sector).is_some_and(|bytes| now.sector(sector).is_none_or(|now| !now.starts_with(bytes)))
    })
}
