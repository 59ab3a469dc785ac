//! The part of a sector bitmap that speaks of one piece of a block (2.4): bit 0 of byte 0 is the first sector, and a bit that is
//! set says that the sector is in this file.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Bits of consecutive sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits(pub Vec<u8>);

impl Bits {
    /// `bytes` bytes of bits, none of which is set.
    #[must_use]
    pub fn none(bytes: usize) -> Self {
        Self(vec![0; bytes])
    }

    /// Whether a sector is in the file; false past the end.
    #[must_use]
    pub fn has(&self, sector: usize) -> bool {
        self.0.get(sector / 8).is_some_and(|byte| byte & 1 << (sector % 8) != 0)
    }

    /// Say that these sectors are in the file. Returns how many were not before.
    pub fn set(&mut self, sectors: Range<usize>) -> usize {
        let mut added = 0;
        for sector in sectors {
            let bit = 1 << (sector % 8);
            if let Some(byte) = self.0.get_mut(sector / 8) {
                added += usize::from(*byte & bit == 0);
                *byte |= bit;
            }
        }
        added
    }

    /// The next run of sectors that are in the file, from `from` on and before `end`.
    #[must_use]
    pub fn next_run(&self, from: usize, end: usize) -> Option<Range<usize>> {
        let mut at = from;
        while at < end && !self.has(at) {
            // Whole bytes of nothing at once.
            let empty = at.is_multiple_of(8) && self.0.get(at / 8).is_none_or(|byte| *byte == 0);
            at += if empty { 8 } else { 1 };
        }
        if at >= end {
            return None;
        }
        let start = at;
        while at < end && self.has(at) {
            at += if at.is_multiple_of(8) && self.0.get(at / 8) == Some(&0xff) { 8 } else { 1 };
        }
        Some(start..at.min(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_bit_is_the_first_sector() {
        let mut bits = Bits::none(4);
        assert_eq!((bits.set(0..1), bits.set(9..12), bits.set(10..13)), (1, 3, 1));
        assert_eq!(bits.0, [1, 0b1_1110, 0, 0]);
        assert_eq!((bits.has(0), bits.has(1), bits.has(12), bits.has(32)), (true, false, true, false));
        assert_eq!(bits.set(30..40), 2);
    }

    #[test]
    fn runs_are_found() {
        let mut bits = Bits::none(16);
        for run in [1..3, 7..9, 16..100, 127..128] {
            bits.set(run);
        }
        let mut runs = vec![];
        let mut at = 0;
        while let Some(run) = bits.next_run(at, 128) {
            at = run.end;
            runs.push(run);
        }
        assert_eq!(runs, [1..3, 7..9, 16..100, 127..128]);
        assert_eq!(
            (bits.next_run(50, 60), bits.next_run(100, 127), bits.next_run(17, 18)),
            (Some(50..60), None, Some(17..18))
        );
    }
}
