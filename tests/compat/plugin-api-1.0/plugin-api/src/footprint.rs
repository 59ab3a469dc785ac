//! How much room a new image takes.

use abi_stable::std_types::ROption;
use abi_stable::StableAbi;

/// How long the files of a new image become, together, depending on how much of its disk is allocated.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Virtual size in bytes, as the image would have it: what was asked for, rounded up to what the format can say.
    pub virtual_size: u64,
    /// Bytes that are allocated at once; 1 for plain bytes.
    pub unit: u64,
    /// Bytes of metadata of an image whose whole disk is allocated. One that holds less needs hardly less: it is counted
    /// whatever is allocated.
    pub overhead: u64,
    /// Only what is allocated takes room. If not, the files are as long as for a full disk from the beginning.
    pub thin: bool,
    /// Bytes that the bitmaps would take besides; `RNone` if the image could have none.
    pub bitmaps: ROption<u64>,
}

impl Footprint {
    /// Bytes of an image whose whole disk is allocated; `None` if that is more than 2^64.
    #[must_use]
    pub fn fully_allocated(&self) -> Option<u64> {
        self.virtual_size.checked_next_multiple_of(self.unit.max(1))?.checked_add(self.overhead)
    }

    /// Bytes of an image of which so many units are allocated, which is no more than the disk has; `None` if that is more than
    /// 2^64.
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
