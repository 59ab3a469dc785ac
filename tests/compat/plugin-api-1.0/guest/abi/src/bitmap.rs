//! The persistent bitmaps of an image.

use core::ffi::c_void;

/// A persistent bitmap of an image: which granules of the disk were written to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WireBitmap {
    /// Its name: `name_length` bytes, which may be any.
    pub name: *const u8,
    /// 1 to [`BITMAP_NAME_MAX`].
    pub name_length: usize,
    /// Bytes of the disk that a bit stands for: a power of two.
    pub granularity: u64,
    /// 1: writes to the disk are recorded in it.
    pub enabled: u32,
    /// 1: it was not saved when the image was closed, and says nothing.
    pub inconsistent: u32,
}

/// Longest name of a bitmap in bytes.
pub const BITMAP_NAME_MAX: usize = 1023;

/// Takes the bitmaps of an image, one at a time.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BitmapOps {
    /// Passed back to `add`.
    pub context: *mut c_void,
    /// A bitmap, which is read before `add` returns.
    pub add: extern "C" fn(context: *mut c_void, bitmap: *const WireBitmap),
}

/// Guest bytes that a bitmap calls dirty.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyRange {
    /// The first byte.
    pub start: u64,
    /// The byte after the last; greater than `start`.
    pub end: u64,
}
