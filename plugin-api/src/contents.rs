//! What an image holds besides its disk: internal snapshots and persistent bitmaps.

use abi_stable::std_types::{ROption, RVec};
use abi_stable::StableAbi;

/// An internal snapshot: an earlier state of the disk that the image keeps.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFacts {
    /// Its identifier, byte for byte as in the image. Hostile.
    pub id: RVec<u8>,
    /// Its name, byte for byte as in the image. Hostile.
    pub name: RVec<u8>,
    /// Virtual size of that disk in bytes.
    pub virtual_size: u64,
    /// Size in bytes of the virtual machine's state that the snapshot keeps; 0 for a disk alone.
    pub vm_state_size: u64,
    /// Time of the snapshot in seconds since 1970 …
    pub date_seconds: u64,
    /// … and nanoseconds.
    pub date_nanoseconds: u32,
    /// Run time of the virtual machine at the snapshot, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Number of instructions that the machine had executed, if it counted them.
    pub instructions: ROption<u64>,
}

impl SnapshotFacts {
    /// Describe a snapshot of a disk of `virtual_size` bytes, without machine state and without a known date.
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

/// A persistent bitmap, which records the parts of the disk that were written since a checkpoint.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct BitmapFacts {
    /// Its name, byte for byte as in the image. Hostile.
    pub name: RVec<u8>,
    /// Bytes of the disk that one bit covers: a power of two.
    pub granularity: u64,
    /// Whether new writes to the disk are recorded in the bitmap.
    pub enabled: bool,
    /// Whether the bitmap was in memory when the image was last open and not closed: its content cannot be trusted.
    pub in_use: bool,
}
