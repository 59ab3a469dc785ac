//! The list of extents that a source enumerates, and the promises that the interface makes about it.

use crate::extent::{checked_end, Content, Extent};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Extents that a source found: ascending, adjacent ones merged, and limited to the requested number.
#[derive(Clone, Debug, Default)]
pub struct Extents {
    list: Vec<Extent>,
    most: usize,
}

impl Extents {
    /// Make an empty list with room for `most` extents.
    #[must_use]
    pub const fn with_room_for(most: usize) -> Self {
        Self { list: Vec::new(), most }
    }

    /// Add an extent, or extend the last one, which takes no room. Returns `false` if there is no room for the extent:
    /// enumeration continues with it in the next call.
    #[must_use]
    pub fn push(&mut self, extent: Extent) -> bool {
        let full = self.is_full();
        match self.list.last_mut() {
            Some(last) if last.is_followed_by(&extent) => last.length = last.length.saturating_add(extent.length),
            _ if full => return false,
            _ => self.list.push(extent),
        }
        true
    }

    /// Return the number of further extents that the list has room for.
    #[must_use]
    pub fn room(&self) -> usize {
        self.most.saturating_sub(self.list.len())
    }

    /// Whether only an extent that continues the last one can be added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Remove all extents; keep the room.
    pub fn clear(&mut self) {
        self.list.clear();
    }
}

impl core::ops::Deref for Extents {
    type Target = [Extent];

    fn deref(&self) -> &[Extent] {
        &self.list
    }
}

/// Check the extents that a source enumerated from guest byte `from` of an image of `size` bytes, and the offset `next` at
/// which it would continue.
///
/// # Errors
/// The first broken promise, with its numbers, in one clause.
pub fn check_extents(found: &[Extent], from: u64, next: u64, size: u64) -> Result<(), String> {
    let mut after = from;
    for (index, extent) in found.iter().enumerate() {
        let Extent { guest_offset, length, content } = *extent;
        let which = which(index, found.len(), from);
        if matches!(content, Content::Memory { .. }) {
            return Err(no_source_has(&which, content.kind() as u32));
        }
        if length == 0 {
            return Err(format!("{which}, at guest byte {guest_offset}, is 0 bytes long"));
        }
        let Some(end) = checked_end(guest_offset, length, size) else {
            return Err(format!(
                "{which}, {length} bytes at guest byte {guest_offset}, passes the end of a disk of {size} bytes"
            ));
        };
        // The first may begin before `from`, in the middle of a run.
        if end <= after || (index > 0 && guest_offset < after) {
            return Err(format!(
                "{which}, {length} bytes at guest byte {guest_offset}, is not behind guest byte {after}"
            ));
        }
        after = end;
    }
    if next < after {
        return Err(format!("it would go on at guest byte {next}, before the end of its last extent at {after}"));
    }
    if next <= from && from < size {
        return Err(format!("it would go on at guest byte {next}, and was asked from {from} on"));
    }
    Ok(())
}

/// How messages name an extent.
fn which(index: usize, count: usize, from: u64) -> String {
    format!("extent {index} of {count} from guest byte {from} on")
}

fn no_source_has(which: &str, kind: u32) -> String {
    format!("{which} is of kind {kind}, which no source has")
}

/// What is wrong with an extent of a kind that does not exist, enumerated as number `index` of `count` from guest byte `from`
/// on.
pub(crate) fn unknown_kind(index: usize, count: usize, from: u64, kind: u32) -> String {
    no_source_has(&which(index, count, from), kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kind` as numbers between modules.
    fn extent(guest_offset: u64, length: u64, kind: u32) -> Extent {
        let content = match kind {
            1 => Content::Data { device: 0, offset: 0 },
            2 => Content::Zero,
            3 => Content::Encoded { location: 0 },
            _ => Content::Memory { address: 0 },
        };
        Extent { guest_offset, length, content }
    }

    #[test]
    fn only_what_goes_on_finds_room_in_a_full_list() {
        let mut found = Extents::with_room_for(2);
        assert!(found.push(Extent::data(0, 4, 1, 100)) && found.push(Extent::data(4, 4, 1, 104)));
        assert!(found.push(Extent::encoded(8, 4, 7)));
        assert!(!found.push(Extent::encoded(12, 4, 11)), "encoded extents are not merged");
        assert_eq!(*found, [Extent::data(0, 8, 1, 100), Extent::encoded(8, 4, 7)]);
        found.clear();
        assert!(found.push(Extent::zero(0, 4)) && found.room() == 1 && found.push(Extent::zero(8, 4)));
        assert!(found.is_full() && !found.push(Extent::zero(16, 4)) && found.push(Extent::zero(12, 1)));
        assert_eq!(*found, [Extent::zero(0, 4), Extent::zero(8, 5)]);
    }

    #[test]
    fn ascending_known_extents_are_good() {
        assert_eq!(check_extents(&[], 0, 100, 100), Ok(()));
        assert_eq!(check_extents(&[extent(0, 10, 1), extent(10, 5, 2), extent(20, 5, 3)], 0, 25, 25), Ok(()));
        assert_eq!(check_extents(&[extent(0, 10, 1)], 5, 10, 25), Ok(()));
        assert_eq!(check_extents(&[], 25, 25, 25), Ok(()));
    }

    #[test]
    fn each_fault_has_its_words_and_numbers() {
        let bad = |found: &[Extent], from, next, size, why: &str| {
            let text = check_extents(found, from, next, size).err().unwrap_or_default();
            assert!(text.contains(why), "{text:?} lacks {why:?}");
        };
        bad(
            &[extent(0, 10, 1), extent(9, 5, 1)],
            0,
            25,
            25,
            "extent 1 of 2 from guest byte 0 on, 5 bytes at guest byte 9",
        );
        bad(&[extent(0, 5, 1)], 5, 25, 25, "is not behind guest byte 5");
        bad(&[extent(20, 6, 1)], 0, 26, 25, "6 bytes at guest byte 20, passes the end of a disk of 25 bytes");
        bad(&[extent(u64::MAX, 2, 1)], 0, u64::MAX, u64::MAX, "passes the end");
        bad(&[], 5, 5, 25, "go on at guest byte 5, and was asked from 5 on");
        bad(&[extent(0, 0, 1)], 0, 25, 25, "guest byte 0, is 0 bytes long");
        bad(&[extent(0, 1, 4)], 0, 25, 25, "is of kind 4, which no source has");
        let unknown = unknown_kind(0, 1, 5, 9);
        assert_eq!(unknown, "extent 0 of 1 from guest byte 5 on is of kind 9, which no source has");
        bad(&[extent(0, 10, 1)], 0, 9, 25, "before the end of its last extent at 10");
    }
}
