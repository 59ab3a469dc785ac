//! Random numbers for tests, the same for the same seed everywhere.

/// A small generator of random numbers (splitmix64): fast, of good quality in all bits, and useless for secrets.
///
/// The numbers depend on the seed alone, so that a failure can be repeated. The sequence of a seed never changes, because
/// campaigns number their inputs by seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Random(u64);

/// The golden ratio in 64 bits: odd, and without a pattern.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Random {
    /// Make a generator with this seed; any number will do.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(seed ^ GOLDEN)
    }

    /// Draw the next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Draw the next byte.
    pub fn byte(&mut self) -> u8 {
        self.next_u64().to_le_bytes()[0]
    }

    /// Draw a number below `end`; 0 if `end` is 0. Small numbers are slightly more likely, which does not matter to tests.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64().checked_rem(end).unwrap_or(0)
    }

    /// [`Random::below`] for places in memory.
    pub fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap_or(0)
    }

    /// Draw true or false with equal probability.
    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    /// Draw one of these.
    ///
    /// # Panics
    /// If the slice is empty.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.index(all.len())]
    }
}
