//! The space that a new image takes.

use abi_stable::std_types::ROption;
use abi_stable::StableAbi;

/// The combined length of a new image's files, as a function of how much of its disk is allocated.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Virtual size of the image in bytes: the size that was asked for, rounded up to one that the format can express.
    pub virtual_size: u64,
    /// Allocation unit in bytes; 1 for plain bytes.
    pub unit: u64,
    /// Bytes of metadata for a fully allocated disk. An image that holds less needs hardly less, so this is counted in full
    /// whatever is allocated.
    pub overhead: u64,
    /// Whether only allocated units take space. If not, the files have the length of a full disk from the start.
    pub thin: bool,
    /// Additional bytes for the bitmaps; `RNone` if the image cannot have any.
    pub bitmaps: ROption<u64>,
}

impl Footprint {
    /// Compute the length of a fully allocated image in bytes; `None` if it exceeds 2^64.
    #[must_use]
    pub fn fully_allocated(&self) -> Option<u64> {
        self.virtual_size.checked_next_multiple_of(self.unit.max(1))?.checked_add(self.overhead)
    }

    /// Compute the length in bytes of an image with `units` allocated units, which must not exceed those of the disk; `None` if
    /// it exceeds 2^64.
    #[must_use]
    pub fn required(&self, units: u64) -> Option<u64> {
        let all = self.virtual_size.div_ceil(self.unit.max(1));
        if self.thin {
            self.unit.max(1).checked_mul(units.min(all))?.checked_add(self.overhead)
        } else {
            self.fully_allocated()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_follows_what_is_allocated() {
        let thin = Footprint { virtual_size: 1000, unit: 512, overhead: 10, thin: true, bitmaps: ROption::RNone };
        assert_eq!(thin.fully_allocated(), Some(1034));
        assert_eq!([0, 1, 2, 3].map(|units| thin.required(units)), [Some(10), Some(522), Some(1034), Some(1034)]);
        let thick = Footprint { thin: false, ..thin };
        assert_eq!(thick.required(0), Some(1034));
        let absurd = Footprint { virtual_size: u64::MAX, overhead: u64::MAX, ..thin };
        assert_eq!((absurd.fully_allocated(), absurd.required(u64::MAX)), (None, None));
    }
}
