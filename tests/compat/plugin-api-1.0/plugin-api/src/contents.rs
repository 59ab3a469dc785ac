//! What an image holds besides its disk: internal snapshots and persistent bitmaps.

use abi_stable::std_types::{ROption, RVec};
use abi_stable::StableAbi;

/// A disk as it once was, which the image keeps.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFacts {
    /// Its identifier, as the bytes that stand in the image. Hostile.
    pub id: RVec<u8>,
    /// Its name, as the bytes that stand in the image. Hostile.
    pub name: RVec<u8>,
    /// Virtual size of that disk in bytes.
    pub virtual_size: u64,
    /// Bytes of the state of the virtual machine that is kept with it; 0 for a disk alone.
    pub vm_state_size: u64,
    /// When it was made, in seconds since 1970 …
    pub date_seconds: u64,
    /// … and nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the virtual machine had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Instructions that it had executed, if that was counted.
    pub instructions: ROption<u64>,
}

impl SnapshotFacts {
    /// A snapshot of a disk of `virtual_size` bytes without the state of a machine, of which no time is known.
    #[must_use]
    pub fn new(id: &[u8], name: &[u8], virtual_size: u64) -> Self {
        Self {
            id: id.to_vec().into(),
            name: name.to_vec().into(),
            virtual_size,
            vm_state_size: 0,
            date_seconds: 0,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            instructions: ROption::RNone,
        }
    }
}

/// A persistent bitmap, which records what of the disk was written since some time.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct BitmapFacts {
    /// Its name, as the bytes that stand in the image. Hostile.
    pub name: RVec<u8>,
    /// Bytes of the disk that a bit stands for: a power of two.
    pub granularity: u64,
    /// What is written to the disk is recorded in it.
    pub enabled: bool,
    /// The image was not closed while the bitmap was in memory: what it says is not to be relied on.
    pub in_use: bool,
}
