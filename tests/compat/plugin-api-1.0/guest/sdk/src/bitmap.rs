//! Persistent bitmaps as a format tells of them: which granules of a disk were written to since the bitmap was made.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_abi::DirtyRange;

/// A persistent bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, as the bytes in the image: 1 to [`BITMAP_NAME_MAX`](instar_guest_abi::BITMAP_NAME_MAX). No two of an image have
    /// the same.
    pub name: Vec<u8>,
    /// Bytes of the disk that a bit stands for: a power of two.
    pub granularity: u64,
    /// Writes to the disk are recorded in it.
    pub enabled: bool,
    /// It was not saved when the image was closed, and says nothing.
    pub inconsistent: bool,
    /// Of several layers that are seen as one: a layer that lies below one with this bitmap lacks it.
    pub ends: bool,
    /// Of several layers that are seen as one: a layer has it, and one above lacks it.
    pub interrupted: bool,
}

impl Bitmap {
    /// A bitmap of a single image.
    #[must_use]
    pub const fn new(name: Vec<u8>, granularity: u64, enabled: bool, inconsistent: bool) -> Self {
        Self { name, granularity, enabled, inconsistent, ends: false, interrupted: false }
    }
}

/// Dirty ranges that a source found: ascending, those that follow each other merged, and no more than were asked for.
#[derive(Clone, Debug, Default)]
pub struct DirtyRanges {
    list: Vec<DirtyRange>,
    most: usize,
}

impl DirtyRanges {
    /// None yet, and room for `most`.
    #[must_use]
    pub const fn with_room_for(most: usize) -> Self {
        Self { list: Vec::new(), most }
    }

    /// Add a range, or lengthen the last one, which takes no room. `false` if there is no room: then the range was not taken, and
    /// enumerating goes on with it in the next call.
    #[must_use]
    pub fn push(&mut self, start: u64, end: u64) -> bool {
        let full = self.list.len() >= self.most;
        match self.list.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ if full => return false,
            _ => self.list.push(DirtyRange { start, end }),
        }
        true
    }

    /// How many there is room for.
    #[must_use]
    pub const fn most(&self) -> usize {
        self.most
    }

    /// Forget all of them; the room stays as it is.
    pub fn clear(&mut self) {
        self.list.clear();
    }
}

impl core::ops::Deref for DirtyRanges {
    type Target = [DirtyRange];

    fn deref(&self) -> &[DirtyRange] {
        &self.list
    }
}

/// Check dirty ranges that were enumerated from guest byte `from` on of a disk of `size` bytes, with `next` as the place to go on.
///
/// # Errors
/// The first promise that is broken, in one clause.
pub fn check_dirty(found: &[DirtyRange], from: u64, next: u64, size: u64) -> Result<(), String> {
    let mut after = from;
    for &DirtyRange { start, end } in found {
        if start < after || end <= start || end > size {
            return Err(format!("a dirty range from {start} to {end}, after {after}, of a disk of {size} bytes"));
        }
        after = end;
    }
    if next <= from || next < after {
        return Err(format!("it would go on at guest byte {next} of a bitmap after {from}"));
    }
    Ok(())
}
