//! What growing a backing takes, once it was planned.

use alloc::vec::Vec;
use instar_guest_sdk::Extent;
use instar_qcow2_format::Bitmap;

/// What growing takes, once it was planned.
#[derive(Debug)]
pub(crate) struct Growth {
    /// The file has to become as long as the image says.
    pub(crate) set_length: bool,
    pub(crate) l1: L1Growth,
    pub(crate) bitmaps: Vec<BitmapGrowth>,
    /// Guest bytes that must become zero.
    pub(crate) zeroes: Option<Extent>,
}

/// What becomes of the L1 table.
#[derive(Clone, Copy, Debug)]
pub(crate) enum L1Growth {
    /// It is long enough.
    Stays,
    /// It gets this many entries where it is.
    InPlace(u32),
    /// It moves, and gets this many entries.
    Moves(u32),
}

/// A bitmap whose table becomes longer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitmapGrowth {
    /// Where its directory entry begins, in bytes.
    pub(crate) at: u64,
    /// The entry as it was.
    pub(crate) old: Bitmap,
    /// Entries of the new table.
    pub(crate) entries: u32,
    /// Which of the bitmaps that are kept up it is, if it is one.
    pub(crate) recorded: Option<usize>,
}
