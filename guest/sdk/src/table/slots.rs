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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    #[test]
    fn gaps_are_given_out_from_the_lowest_on_and_then_what_lies_behind() {
        let held = [0, 2, WINDOW + 5, WINDOW + 7];
        // All others of both windows are used, too.
        let all = |slot: u64| held.contains(&slot) || slot != 1 && slot != WINDOW + 6 && slot != WINDOW + 3;
        let mut slots = Slots::new(WINDOW + 8, WINDOW + 8 - 3);
        assert_eq!(
            (slots.top_after(2), slots.top_after(5), slots.top_from(9, 5)),
            (WINDOW + 8, WINDOW + 10, WINDOW + 13)
        );
        let mut windows = 0;
        let mut given = Vec::new();
        for _ in 0..5 {
            let gap = slots.take_gap(&mut |used| {
                windows += 1;
                (0..WINDOW + 8).filter(|&slot| all(slot)).for_each(|slot| assert!(used.add(slot)));
                Ok(())
            });
            given.push(gap.unwrap().unwrap_or_else(|| slots.append().unwrap()));
        }
        assert_eq!(given, vec![1, WINDOW + 3, WINDOW + 6, WINDOW + 8, WINDOW + 9]);
        assert_eq!((windows, slots.top()), (2, WINDOW + 10), "each window is looked at once");
    }

    #[test]
    fn what_is_skipped_is_not_given_out() {
        let mut slots = Slots::new(10, 5);
        slots.skip_to(20);
        assert_eq!(slots.take_gap(&mut |_| unreachable!("there are no gaps")).unwrap(), None);
        assert_eq!((slots.append().unwrap(), slots.top()), (20, 21));
        slots.skip_to(u64::MAX);
        slots.append().unwrap_err();
    }
}
