//! The block map: a number of 32 bits for each block of the disk (`VDIIMAGEBLOCKPOINTER`), little-endian.

/// Bytes of an entry.
pub const ENTRY_BYTES: u64 = 4;

/// `VDI_IMAGE_BLOCK_FREE`.
const FREE: u32 = u32::MAX;
/// `VDI_IMAGE_BLOCK_ZERO`.
const ZERO: u32 = u32::MAX - 1;

/// What the map says of a block of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing: what is below shows, and zeroes where nothing is below (`vdiRead`, `VERR_VD_BLOCK_FREE`).
    Free,
    /// Zeroes, without a place in the file; what is below is not asked.
    Zero,
    /// The block is the one with this number in the data area.
    Slot(u32),
}

impl Entry {
    /// The meaning of an entry (`IS_VDI_IMAGE_BLOCK_ALLOCATED`).
    #[must_use]
    pub const fn decode(entry: u32) -> Self {
        match entry {
            FREE => Self::Free,
            ZERO => Self::Zero,
            slot => Self::Slot(slot),
        }
    }

    /// The entry that means this.
    #[must_use]
    pub const fn encode(self) -> u32 {
        match self {
            Self::Free => FREE,
            Self::Zero => ZERO,
            Self::Slot(slot) => slot,
        }
    }

    /// Its place in the data area, if it has one.
    #[must_use]
    pub const fn slot(self) -> Option<u32> {
        match self {
            Self::Slot(slot) => Some(slot),
            Self::Free | Self::Zero => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_highest_numbers_are_no_slots() {
        for (number, entry) in [
            (0, Entry::Slot(0)),
            (0xffff_fffd, Entry::Slot(0xffff_fffd)),
            (0xffff_fffe, Entry::Zero),
            (0xffff_ffff, Entry::Free),
        ] {
            assert_eq!((Entry::decode(number), entry.encode()), (entry, number));
        }
        assert_eq!((Entry::Slot(7).slot(), Entry::Zero.slot()), (Some(7), None));
    }
}
