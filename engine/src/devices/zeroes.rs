//! The known ranges of a file that hold data or read as zeroes.
//!
//! `lseek(SEEK_HOLE)` walks the extents of the file until the data ends, however little of it matters: one call for each of
//! many requests makes a commit take quadratic time. So no part of a file is examined twice. Answers of the file system are
//! remembered, writes of this process are noted, and a question begins before the place of interest once answers overlap known
//! ranges.

use rustix::fs::SeekFrom;
use std::collections::BTreeMap;
use std::fs::File;

/// Ranges that are remembered at most. Past that all are forgotten: each costs 40 bytes or so.
const MAX_RANGES: usize = 1 << 16;
/// How many bytes before the place of interest a question begins, once that makes sense at all.
const FIRST_STEP: u64 = 1 << 20;

/// A range of a file of which something is known; it begins at its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    end: u64,
    /// It reads as zeroes, and need not be read. The other ranges may hold anything.
    zero: bool,
}

/// The known ranges of a file. They do not overlap, and adjacent ones differ.
#[derive(Debug, Default)]
pub struct Zeroes {
    ranges: BTreeMap<u64, Known>,
    /// Bytes before the place of interest at which a question begins. It doubles with every answer that overlaps known ranges,
    /// so that few do, in whatever order the file is walked.
    step: u64,
    /// Known beginning of data: the end of the last hole.
    data_at: Option<u64>,
}

/// The file system's view of where data begins and ends; `None` without an answer.
pub trait Seek {
    /// The first data at or after `from`; `u64::MAX` if there is none.
    fn data(&self, from: u64) -> Option<u64>;
    /// The first hole at or after `from`, which is within data.
    fn hole(&self, from: u64) -> Option<u64>;
}

impl Seek for File {
    fn data(&self, from: u64) -> Option<u64> {
        match rustix::fs::seek(self, SeekFrom::Data(from)) {
            Ok(data) => Some(data),
            Err(rustix::io::Errno::NXIO) => Some(u64::MAX),
            Err(_) => None,
        }
    }

    fn hole(&self, from: u64) -> Option<u64> {
        rustix::fs::seek(self, SeekFrom::Hole(from)).ok()
    }
}

impl Zeroes {
    /// Find the next data within `from..end` and return its bounds; `(end, end)` if the whole range reads as zeroes. Without an
    /// answer of the file system, everything is data.
    pub fn next_data(&mut self, file: &impl Seek, from: u64, end: u64) -> (u64, u64) {
        let mut data = from;
        while let Some(known) = self.look(file, data, end).filter(|known| known.zero) {
            data = known.end.min(end);
        }
        let mut hole = data;
        while hole < end {
            match self.look(file, hole, end) {
                Some(known) if known.zero => return (data, hole),
                Some(known) => hole = known.end.min(end),
                None => return (data, end),
            }
        }
        (data, hole)
    }

    /// Whether all of `from..end` is known to read as zeroes. Does not ask the file system.
    pub fn all_zero(&self, from: u64, end: u64) -> bool {
        from >= end || self.at(from).is_some_and(|known| known.zero && known.end >= end)
    }

    /// Record that `from..end` was written, or is about to be: it may hold anything, or reads as zeroes.
    pub fn note(&mut self, from: u64, end: u64, zero: bool) {
        self.forget(from, end);
        self.insert(from, end, zero);
    }

    /// Forget everything about `from..end`.
    pub fn forget(&mut self, from: u64, end: u64) {
        self.data_at = None;
        if from >= end {
            return;
        }
        if let Some((&start, known)) = self.ranges.range_mut(..from).next_back() {
            let Known { end: known_end, zero } = *known;
            if known_end > from {
                *known = Known { end: from, zero };
                debug_assert!(start < from);
                if known_end > end {
                    self.ranges.insert(end, Known { end: known_end, zero });
                    return;
                }
            }
        }
        while let Some((&start, &known)) = self.ranges.range(from..end).next() {
            self.ranges.remove(&start);
            if known.end > end {
                self.ranges.insert(end, known);
            }
        }
    }

    /// What is known of the byte at `at`.
    fn at(&self, at: u64) -> Option<Known> {
        self.ranges.range(..=at).next_back().map(|(_, known)| *known).filter(|known| known.end > at)
    }

    /// Find out about the byte at `at`, which lies before `end`.
    fn look(&mut self, file: &impl Seek, at: u64, end: u64) -> Option<Known> {
        if at >= end {
            return None;
        }
        if let Some(known) = self.at(at) {
            return Some(known);
        }
        if self.ranges.len() > MAX_RANGES {
            *self = Self::default();
        }
        let before = self.ranges.range(..at).next_back().map_or(0, |(_, known)| known.end);
        let next = self.ranges.range(at..).next().map_or(u64::MAX, |(&start, _)| start);
        let mut from = before.max(at.saturating_sub(self.step));
        loop {
            let data = if self.data_at == Some(from) { from } else { file.data(from)?.max(from) };
            let (to, zero) = if data > from { (data, true) } else { (file.hole(from)?, false) };
            self.data_at = zero.then_some(to);
            // A file that is changed meanwhile may say anything; what does not lead on is no answer.
            let to = (to > from).then_some(to)?;
            if to > next {
                self.step = self.step.saturating_mul(2).max(FIRST_STEP);
            }
            let to = to.min(next);
            self.insert(from, to, zero);
            if to > at {
                return self.at(at);
            }
            from = to;
        }
    }

    /// Remember a range of which nothing was known; it becomes one with a like one that it touches.
    fn insert(&mut self, mut from: u64, mut end: u64, zero: bool) {
        if from >= end {
            return;
        }
        if let Some((&start, known)) = self.ranges.range(..from).next_back() {
            if known.end == from && known.zero == zero {
                from = start;
            }
        }
        if let Some(&known) = self.ranges.get(&end).filter(|known| known.zero == zero) {
            self.ranges.remove(&end);
            end = known.end;
        }
        self.ranges.insert(from, Known { end, zero });
    }
}

#[cfg(test)]
#[path = "zeroes_tests.rs"]
mod tests;
