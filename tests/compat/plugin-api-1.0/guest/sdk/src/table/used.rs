//! The used parts of a file, a window at a time: a bit for each sector, cluster or slot.
//!
//! Two entries that name one place are found by marking what each of them names. A file may have far more places than the
//! memory of the sandbox has bits; it is gone through several times then, each time for another window of it, and only for
//! those windows in which anything lies: a file of exabytes that is a hole takes no longer than what it holds.

use crate::error::{overflow, DriverResult};
use crate::io::BlockIo;
use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Units that are looked at in one go, at most: 16 MiB of memory; less where the heap is small …
const MOST: u64 = 1 << 27;
/// … but not less than this: 256 KiB.
const LEAST: u64 = 1 << 21;

/// The windows of a file, and the subset of them in which the first pass has found used places.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Units of a window.
    size: u64,
    end: u64,
    reached: BTreeSet<u64>,
    /// The window of this pass.
    index: Option<u64>,
}

impl Windows {
    /// Divide `0..end` into windows, of which `sets` sets are held at once. Together they take at most a quarter of the heap
    /// and at most 16 MiB. There is at least one window.
    #[must_use]
    pub fn over(io: &dyn BlockIo, end: u64, sets: u64) -> Self {
        let room = (io.heap_free() as u64).saturating_mul(2);
        let size = MOST.min(room).max(LEAST) / sets.max(1);
        Self { size: size.max(1), end: end.max(1), reached: BTreeSet::new(), index: None }
    }

    /// Begin the next pass: its window, which is the first one, or one that was reached. `None` if there are no more.
    pub fn next_window(&mut self) -> Option<Range<u64>> {
        let index = match self.index {
            None => 0,
            Some(before) => self.reached.range(before.checked_add(1)?..).next().copied()?,
        };
        self.index = Some(index);
        let start = index.saturating_mul(self.size);
        Some(start.min(self.end)..start.saturating_add(self.size).min(self.end))
    }

    /// Whether this is the first pass, in which everything is counted, and told of, once.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.index == Some(0)
    }

    /// Something lies here. The first pass says so of everything; later ones change nothing. What lies behind the end has no
    /// window.
    pub fn reach(&mut self, range: &Range<u64>) {
        if !self.is_first() {
            return;
        }
        let last = range.end.saturating_sub(1).max(range.start).min(self.end - 1) / self.size;
        self.reached.extend(range.start / self.size..=last);
    }
}

/// What of a window is used.
#[derive(Clone, Debug)]
pub struct Used {
    window: Range<u64>,
    words: Vec<u64>,
}

impl Used {
    /// Nothing of this window.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn of(window: Range<u64>) -> DriverResult<Self> {
        let words = window.end.saturating_sub(window.start).div_ceil(64);
        Ok(Self { window, words: vec![0; usize::try_from(words).map_err(|_| overflow("a window"))?] })
    }

    /// What of a range lies in the window: the index of each word, and the bits.
    fn words_of(&self, range: &Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        let start = self.window.start;
        let (mut at, end) = (range.start.max(start), range.end.min(self.window.end));
        core::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let bit = (at - start) % 64;
            let count = (64 - bit).min(end - at);
            let index = usize::try_from((at - start) / 64).ok()?;
            at += count;
            Some((index, (u64::MAX >> (64 - count)) << bit))
        })
    }

    /// Add a unit, if it lies in the window. `false` if it was there before.
    pub fn add(&mut self, unit: u64) -> bool {
        self.add_all(&(unit..unit.saturating_add(1)))
    }

    /// Add what of a range lies in the window. `false` if any of it was there before.
    pub fn add_all(&mut self, range: &Range<u64>) -> bool {
        let mut free = true;
        for (index, bits) in self.words_of(range) {
            if let Some(word) = self.words.get_mut(index) {
                free &= *word & bits == 0;
                *word |= bits;
            }
        }
        free
    }

    /// Whether any of a range was added. What lies outside of the window was not.
    #[must_use]
    pub fn has_any(&self, range: &Range<u64>) -> bool {
        self.words_of(range).any(|(index, bits)| self.words.get(index).is_some_and(|word| word & bits != 0))
    }

    /// Whether a unit was added. One outside of the window was not.
    #[must_use]
    pub fn contains(&self, unit: u64) -> bool {
        self.has_any(&(unit..unit.saturating_add(1)))
    }

    /// The first unit of the window, from `from` on, that was not added.
    #[must_use]
    pub fn first_free(&self, from: u64) -> Option<u64> {
        let mut parts = self.words_of(&(from..self.window.end));
        parts.find_map(|(index, bits)| {
            let free = !self.words.get(index)? & bits;
            (free != 0).then(|| self.window.start + index as u64 * 64 + u64::from(free.trailing_zeros()))
        })
    }
}
