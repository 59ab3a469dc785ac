//! What an examination of an image finds, and what a repair mends.

use core::ffi::c_void;

/// What an examination found, in numbers. What a format does not count is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckSummary {
    /// Where the last cluster that is in use, or has a refcount, ends: bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a cluster in the file.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Of these, those that are compressed.
    pub compressed_clusters: u64,
    /// What is wrong and may lose data.
    pub corruptions: u64,
    /// Clusters that are allocated and that nothing refers to.
    pub leaks: u64,
    /// Bytes of the file behind `image_end_offset`: nobody's, but they may take space. Whole clusters.
    pub unused_tail: u64,
}

/// What a finding is. Passed as `u32`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// Data may be lost.
    Corruption = 1,
    /// Space is wasted.
    Leak = 2,
}

impl FindingKind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Corruption,
            2 => Self::Leak,
            _ => return None,
        })
    }
}

/// What a repair mends. Passed as `u32`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Leaks alone.
    Leaks = 1,
    /// Leaks, and corruptions as far as nothing is lost by it.
    All = 2,
}

impl Repair {
    /// The repair with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Leaks,
            2 => Self::All,
            _ => return None,
        })
    }
}

/// What a repair mends, counted as [`CheckSummary`] counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairSummary {
    /// Corruptions that are mended.
    pub corruptions: u64,
    /// Leaks that are mended.
    pub leaks: u64,
    /// Upper bound of the file's length in bytes while it is mended and afterwards; 0 for no longer than it is.
    pub final_length: u64,
}

/// Takes the findings of an examination, one at a time.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FindingOps {
    /// Passed back to `add`.
    pub context: *mut c_void,
    /// A finding: a [`FindingKind`] as a number and one line of UTF-8 of `length` bytes.
    pub add: extern "C" fn(context: *mut c_void, kind: u32, text: *const u8, length: usize),
}
