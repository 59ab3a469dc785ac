//! How a disk will grow: planned before anything changes.

use core::ops::Range;
use instar_vmdk_format::NewSize;

/// A growth that was agreed to.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    pub size: NewSize,
    /// Bytes of the last extent until now.
    pub old_length: u64,
    /// Of a disk in one file, where the descriptor belongs: byte offset and bytes.
    pub home: Option<(u64, u64)>,
}

/// The same of a sparse extent.
#[derive(Clone, Debug)]
pub struct SparseGrowth {
    /// The first entry of the directories that is new.
    pub from: usize,
    /// Both directories get another place.
    pub moves: bool,
    /// Guest bytes past the old end that something may be said of.
    pub hidden: Range<u64>,
    /// The first byte of the file behind all that is new.
    pub end: u64,
}
