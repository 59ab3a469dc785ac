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
