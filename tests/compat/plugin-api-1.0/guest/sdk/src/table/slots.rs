//! Where new clusters go: into the lowest slot that no entry names, and behind all others once there is no gap left.
//!
//! Gaps are what discards leave, and crashes: some of the entries that a run has written are there, and others are not. As they
//! are filled first, running a commit again takes back what an interrupted run lost.

use super::used::Used;
use crate::error::{overflow, DriverResult};
use core::ops::Range;

/// Slots among which gaps are looked for at once: 1 MiB of memory. For each such window that has gaps, the table is read.
const WINDOW: u64 = 1 << 23;

/// The slots of a file: places for one cluster each, counted from a begin that the format knows.
#[derive(Debug, Default)]
pub struct Slots {
    /// One more than the highest slot that is used, or was given out.
    top: u64,
    /// Gaps below the first top that were not given out …
    gaps: u64,
    /// … and from where on they lie.
    from: u64,
    window: Option<(u64, Used)>,
}

impl Slots {
    /// Those that entries leave which name `used` slots, no slot twice and none at or above `top`.
    #[must_use]
    pub fn new(top: u64, used: u64) -> Self {
        Self { top, gaps: top.saturating_sub(used), from: 0, window: None }
    }

    /// One more than the highest slot that is used or was given out.
    #[must_use]
    pub fn top(&self) -> u64 {
        self.top
    }

    /// Return [`Slots::top`] after giving out `more` slots, gaps first.
    #[must_use]
    pub fn top_after(&self, more: u64) -> u64 {
        self.top.saturating_add(more.saturating_sub(self.gaps))
    }

    /// Return [`Slots::top`] after giving out `more` slots, none of which is below `slot` or a gap.
    #[must_use]
    pub fn top_from(&self, slot: u64, more: u64) -> u64 {
        self.top.max(slot).saturating_add(more)
    }

    /// Give out none below `slot` any more, and fill no gaps.
    pub fn skip_to(&mut self, slot: u64) {
        self.top = self.top.max(slot);
        self.gaps = 0;
    }

    /// Give out the lowest slot that nothing uses, if one below all others is free: `None` asks for [`Slots::append`]. `mark`
    /// marks the slots that the table in the file names, those of one window at once; what was given out since lies below them.
    ///
    /// # Errors
    /// Those of `mark`; an arithmetic guard.
    pub fn take_gap(&mut self, mark: &mut dyn FnMut(&mut Used) -> DriverResult<()>) -> DriverResult<Option<u64>> {
        while self.gaps > 0 && self.from < self.top {
            let start = self.from - self.from % WINDOW;
            let end = start.saturating_add(WINDOW);
            if self.window.as_ref().is_none_or(|(first, _)| *first != start) {
                self.window = Some((start, window(start..self.top.min(end), mark)?));
            }
            if let Some(gap) = self.window.as_ref().and_then(|(_, used)| used.first_free(self.from)) {
                self.gaps -= 1;
                self.from = gap.saturating_add(1);
                return Ok(Some(gap));
            }
            self.from = end;
        }
        self.window = None;
        Ok(None)
    }

    /// Give out the slot behind all others.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn append(&mut self) -> DriverResult<u64> {
        let slot = self.top;
        self.top = slot.checked_add(1).ok_or_else(|| overflow("the number of a slot"))?;
        Ok(slot)
    }
}

fn window(range: Range<u64>, mark: &mut dyn FnMut(&mut Used) -> DriverResult<()>) -> DriverResult<Used> {
    let mut used = Used::of(range)?;
    mark(&mut used)?;
    Ok(used)
}
