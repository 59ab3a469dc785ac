//! Persistent bitmaps as formats describe them: the granules of a disk that were written since the bitmap was made.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_abi::DirtyRange;

/// A persistent bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, byte for byte as in the image: 1 to [`BITMAP_NAME_MAX`](instar_guest_abi::BITMAP_NAME_MAX) bytes, unique
    /// within the image.
    pub name: Vec<u8>,
    /// Bytes of the disk that one bit covers: a power of two.
    pub granularity: u64,
    /// Whether new writes to the disk are recorded in it.
    pub enabled: bool,
    /// Whether it was not saved when the image was closed, so that it says nothing.
    pub inconsistent: bool,
    /// For several layers seen as one: whether a layer below one with this bitmap lacks it.
    pub ends: bool,
    /// For several layers seen as one: whether a layer has it that lies below one without it.
    pub interrupted: bool,
}

impl Bitmap {
    /// Describe a bitmap of a single image.
    #[must_use]
    pub const fn new(name: Vec<u8>, granularity: u64, enabled: bool, inconsistent: bool) -> Self {
        Self { name, granularity, enabled, inconsistent, ends: false, interrupted: false }
    }
}

/// Dirty ranges that a source found: ascending, adjacent ones merged, and limited to the requested number.
#[derive(Clone, Debug, Default)]
pub struct DirtyRanges {
    list: Vec<DirtyRange>,
    most: usize,
}

impl DirtyRanges {
    /// Make an empty list with room for `most` ranges.
    #[must_use]
    pub const fn with_room_for(most: usize) -> Self {
        Self { list: Vec::new(), most }
    }

    /// Add a range, or extend the last one, which takes no room. Returns `false` if there is no room for the range: enumeration
    /// continues with it in the next call.
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

    /// Return the total number of ranges that the list has room for.
    #[must_use]
    pub const fn most(&self) -> usize {
        self.most
    }

    /// Remove all ranges; keep the room.
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

/// Check dirty ranges that a source enumerated from guest byte `from` of a disk of `size` bytes, and the offset `next` at which
/// it would continue.
///
/// # Errors
/// The first broken promise, in one clause.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_merged_and_counted() {
        let mut ranges = DirtyRanges::with_room_for(2);
        assert!(ranges.push(0, 10) && ranges.push(10, 20) && ranges.push(30, 40) && !ranges.push(50, 60));
        assert!(ranges.push(40, 45), "what lengthens the last one takes no room");
        let all = [DirtyRange { start: 0, end: 20 }, DirtyRange { start: 30, end: 45 }];
        assert_eq!(&*ranges, all);
        assert_eq!(check_dirty(&ranges, 0, 45, 45), Ok(()));
        for (from, next, size) in [(1, 45, 45), (0, 44, 45), (0, 45, 44), (45, 45, 100)] {
            assert!(check_dirty(&ranges, from, next, size).is_err(), "{from} {next} {size}");
        }
        assert!(check_dirty(&[DirtyRange { start: 5, end: 5 }], 0, 9, 9).is_err());
    }
}
