//! A sector of a block's bitmap ("Block Allocation Table and Data Blocks"): a bit for each sector of data, the highest bit of a
//! byte first. 1: the sector is there. 0: it is the parent's, or, in a dynamic disk, was never written and is zero.

use core::ops::Range;

/// Bits of a sector of bitmap.
const BITS: usize = 4096;

/// A sector of a bitmap: 4096 bits, which stand for 2 MiB of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap(pub [u8; 512]);

impl Bitmap {
    /// No sector is there.
    pub const EMPTY: Self = Self([0; 512]);
    /// All sectors are.
    pub const FULL: Self = Self([0xff; 512]);

    /// Whether a sector is there.
    #[must_use]
    pub fn has(&self, sector: usize) -> bool {
        self.0.get(sector / 8).is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0)
    }

    /// Say that these sectors are there. Returns whether any of them was not.
    pub fn set(&mut self, sectors: Range<usize>) -> bool {
        let mut changed = false;
        for sector in sectors {
            let mask = 0x80 >> (sector % 8);
            if let Some(byte) = self.0.get_mut(sector / 8) {
                changed |= *byte & mask == 0;
                *byte |= mask;
            }
        }
        changed
    }

    /// The first run of sectors that are there, at or behind `from` and before `end`.
    #[must_use]
    pub fn next_run(&self, from: usize, end: usize) -> Option<Range<usize>> {
        let end = end.min(BITS);
        let start = self.find(from, end, true)?;
        Some(start..self.find(start, end, false).unwrap_or(end))
    }

    /// The first sector at or behind `from` and before `end` that is there, or that is not.
    fn find(&self, from: usize, end: usize, wanted: bool) -> Option<usize> {
        let skipped = if wanted { 0 } else { 0xff };
        let mut at = from;
        while at < end {
            if at.is_multiple_of(8) && self.0.get(at / 8) == Some(&skipped) {
                at += 8;
            } else if self.has(at) == wanted {
                return Some(at);
            } else {
                at += 1;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_bit_comes_first() {
        let mut bitmap = Bitmap::EMPTY;
        assert!(bitmap.set(0..1) && bitmap.set(9..12) && !bitmap.set(10..11));
        assert_eq!(bitmap.0[..2], [0x80, 0x70]);
        assert!(bitmap.has(0) && !bitmap.has(1) && !bitmap.has(8) && bitmap.has(11) && !bitmap.has(4096));
    }

    #[test]
    fn runs() {
        let mut bitmap = Bitmap::EMPTY;
        assert_eq!(bitmap.next_run(0, 4096), None);
        assert_eq!(Bitmap::FULL.next_run(5, 4096), Some(5..4096));
        assert_eq!(Bitmap::FULL.next_run(4096, 5000), None);
        assert_eq!(Bitmap::FULL.next_run(0, 7), Some(0..7));
        let _ = (bitmap.set(3..40), bitmap.set(100..101), bitmap.set(4095..4096));
        assert_eq!(bitmap.next_run(0, 4096), Some(3..40));
        assert_eq!(bitmap.next_run(20, 4096), Some(20..40));
        assert_eq!(bitmap.next_run(40, 4096), Some(100..101));
        assert_eq!(bitmap.next_run(101, 4096), Some(4095..4096));
        assert_eq!(bitmap.next_run(101, 4095), None);
    }
}
