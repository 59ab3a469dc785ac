//! What of a file is used, in windows: a bit for each sector or grain, and one window of them in memory at a time.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};

/// Sectors or grains that are looked at in one go: of sectors 64 GiB, 16 MiB of memory; less where the heap is small …
const WINDOW: u64 = 1 << 27;
/// … but not less than this: of sectors 1 GiB.
const MIN_WINDOW: u64 = 1 << 21;

/// The windows of a file, and which of them the first pass found anything in.
pub struct Windows {
    /// Length of a window.
    window: u64,
    end: u64,
    reached: Vec<bool>,
}

impl Windows {
    /// Windows over `0..end`: a bit for each of them takes a quarter of the heap at most.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn over(io: &dyn BlockIo, end: u64) -> DriverResult<Self> {
        let window = WINDOW.min((io.heap_free() as u64).saturating_mul(2)).max(MIN_WINDOW);
        let count = usize::try_from(end.div_ceil(window)).map_err(|_| overflow("a window"))?;
        Ok(Self { window, end, reached: vec![false; count] })
    }

    pub fn count(&self) -> usize {
        self.reached.len()
    }

    /// What lies in a window.
    pub fn range(&self, index: usize) -> Range<u64> {
        let start = (index as u64).saturating_mul(self.window);
        start..self.end.min(start.saturating_add(self.window))
    }

    /// Something lies here.
    pub fn reach(&mut self, range: &Range<u64>) {
        let last = range.end.saturating_sub(1).max(range.start) / self.window;
        for window in range.start / self.window..=last {
            let index = usize::try_from(window).unwrap_or(usize::MAX);
            self.reached.get_mut(index).into_iter().for_each(|reached| *reached = true);
        }
    }

    pub fn is_reached(&self, index: usize) -> bool {
        self.reached.get(index) == Some(&true)
    }
}

/// What of a window is used.
pub struct Used {
    window: Range<u64>,
    words: Vec<u64>,
}

impl Used {
    /// Nothing of this window.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn new(window: Range<u64>) -> DriverResult<Self> {
        let words = usize::try_from((window.end - window.start).div_ceil(64)).map_err(|_| overflow("a window"))?;
        Ok(Self { window, words: vec![0; words] })
    }

    /// Mark what of a range lies in the window. `false` if any was marked before.
    pub fn mark(&mut self, range: &Range<u64>) -> bool {
        let (mut at, end) = (range.start.max(self.window.start), range.end.min(self.window.end));
        let mut free = true;
        while at < end {
            let bit = (at - self.window.start) % 64;
            let count = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let index = usize::try_from((at - self.window.start) / 64).unwrap_or(usize::MAX);
            match self.words.get_mut(index) {
                Some(word) => {
                    free &= *word & mask == 0;
                    *word |= mask;
                }
                None => free = false,
            }
            at += count;
        }
        free
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn marks_what_lies_in_the_window() {
        let mut used = Used::new(100..300).unwrap();
        assert!(used.mark(&(0..101)));
        assert!(!used.mark(&(100..101)));
        assert!(used.mark(&(101..229)));
        assert!(!used.mark(&(228..230)));
        assert!(used.mark(&(230..1000)));
        assert!(!used.mark(&(299..300)));
        assert!(used.mark(&(300..400)) && used.mark(&(300..400)), "not in the window");
    }

    #[test]
    fn windows_that_anything_lies_in() {
        let io = instar_guest_sdk::memory::MemoryDevices::new([]);
        let mut windows = Windows::over(&io, 5 << 27).unwrap();
        let count = windows.count() as u64;
        let length = windows.range(0).end;
        windows.reach(&(length - 1..length + 1));
        windows.reach(&(3 * length..3 * length));
        let reached: Vec<_> = (0..5).filter(|&index| windows.is_reached(index)).collect();
        assert_eq!(reached, [0, 1, 3]);
        assert_eq!(windows.range(windows.count() - 1).end, 5 << 27);
        assert_eq!((5u64 << 27).div_ceil(length), count);
    }
}
