//! Entries of the block allocation table (2.5.1).

/// What an entry says of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is here: zeroes without a parent, the parent's bytes with one.
    NotPresent,
    /// Nothing is known, and the parent is not asked: read as zeroes.
    Undefined,
    /// Zeroes.
    Zero,
    /// The guest gave the block up, and the parent is not asked: read as zeroes.
    Unmapped,
    /// All of it is in this file.
    FullyPresent,
    /// The sector bitmap says which sectors are in this file; the others show from the parent.
    PartiallyPresent,
}

/// An entry of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(pub u64);

const RESERVED: u64 = 0xf_fff8;
const STATE: u64 = 7;

impl Entry {
    /// A block that is not here.
    pub const NONE: Self = Self(0);
    /// A block of zeroes.
    pub const ZERO: Self = Self(2);
    /// The state of a sector bitmap block that is here.
    pub const BITMAP_PRESENT: u64 = 6;

    /// An entry for a block at byte `offset`, a multiple of 1 MiB; `partially` if its bitmap counts.
    #[must_use]
    pub const fn present(offset: u64, partially: bool) -> Self {
        Self(offset & !(RESERVED | STATE) | if partially { 7 } else { 6 })
    }

    /// What it says of a payload block; `None` for what no entry may say.
    #[must_use]
    pub const fn state(self) -> Option<State> {
        if self.0 & RESERVED != 0 {
            return None;
        }
        Some(match self.0 & STATE {
            0 => State::NotPresent,
            1 => State::Undefined,
            2 => State::Zero,
            3 => State::Unmapped,
            6 => State::FullyPresent,
            7 => State::PartiallyPresent,
            _ => return None,
        })
    }

    /// Whether a sector bitmap block is there; `None` for what no entry may say.
    #[must_use]
    pub const fn has_bitmap(self) -> Option<bool> {
        match self.0 & (RESERVED | STATE) {
            0 => Some(false),
            Self::BITMAP_PRESENT => Some(true),
            _ => None,
        }
    }

    /// Byte offset of the block in the file, a multiple of 1 MiB.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 & !(RESERVED | STATE)
    }

    /// The place that an entry reserves although the block is not read from it: who gave a block up may have left its place in
    /// the entry (2.5.1.1, PAYLOAD_BLOCK_UNDEFINED and UNMAPPED). `None` if there is none.
    #[must_use]
    pub fn reservation(self) -> Option<u64> {
        let kept = matches!(self.state(), Some(State::Undefined | State::Unmapped));
        Some(self.offset()).filter(|&offset| kept && offset != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_taken_apart() {
        assert_eq!(Entry(5 << 20 | 6).state(), Some(State::FullyPresent));
        assert_eq!(Entry::present(5 << 20, true), Entry(5 << 20 | 7));
        assert_eq!((Entry(5 << 20 | 7).offset(), Entry(u64::MAX).offset()), (5 << 20, !0xf_ffff));
        assert_eq!((Entry(4).state(), Entry(5).state(), Entry(8).state()), (None, None, None));
        assert_eq!((Entry(0).has_bitmap(), Entry(1 << 20 | 6).has_bitmap()), (Some(false), Some(true)));
        assert_eq!((Entry(7).has_bitmap(), Entry(1 << 19 | 6).has_bitmap()), (None, None));
        assert_eq!((Entry(3 << 20 | 3).reservation(), Entry(3).reservation()), (Some(3 << 20), None));
        assert_eq!((Entry(3 << 20 | 2).reservation(), Entry(3 << 20).reservation()), (None, None));
    }
}
