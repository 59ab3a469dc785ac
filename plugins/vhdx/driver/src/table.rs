//! The block allocation table, a window of it at a time: a disk of 64 TiB has up to 512 MiB of it. What of it lies in a hole
//! of the file is not read: its entries are 0.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, Holes};
use instar_vhdx_format::Entry;

/// Entries of a page.
const IN_A_PAGE: u64 = 512;

/// Entries in memory.
#[derive(Debug, Default)]
pub struct Table {
    range: Range<u64>,
    /// Empty if all of them are 0.
    entries: Vec<Entry>,
}

impl Table {
    /// Read these entries, in whole pages as far as the disk has some.
    ///
    /// # Errors
    /// I/O errors.
    pub fn read(io: &mut dyn BlockIo, image: &Image, holes: &mut Holes, wanted: Range<u64>) -> DriverResult<Self> {
        let first = wanted.start - wanted.start % IN_A_PAGE;
        let end = wanted.end.next_multiple_of(IN_A_PAGE).min(image.layout.entries()).max(first);
        let (range, place) = (first..end, image.entry_place(first)..image.entry_place(end));
        let in_hole =
            !image.is_logged(&place) && holes.hold_data(io, image.device, core::slice::from_ref(&place))? == [false];
        if in_hole {
            return Ok(Self { range, entries: Vec::new() });
        }
        let count = usize::try_from(end - first).map_err(|_| overflow("the block allocation table"))?;
        let mut bytes = vec![0u8; count.checked_mul(8).ok_or_else(|| overflow("the block allocation table"))?];
        image.read(io, place.start, &mut bytes)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let mut entries: Vec<Entry> = entries.iter().map(|entry| Entry(u64::from_le_bytes(*entry))).collect();
        if entries.iter().all(|entry| *entry == Entry::NONE) {
            entries = Vec::new();
        }
        Ok(Self { range, entries })
    }

    /// An entry, if it is in memory.
    pub fn get(&self, entry: u64) -> Option<Entry> {
        if !self.range.contains(&entry) {
            return None;
        }
        let index = usize::try_from(entry - self.range.start).ok()?;
        Some(self.entries.get(index).copied().unwrap_or_default())
    }

    /// All entries from this one on and before the one that is returned are 0, as far as is known.
    pub fn nothing_until(&self, entry: u64) -> u64 {
        let known = self.entries.is_empty() && self.range.contains(&entry);
        if known {
            self.range.end
        } else {
            entry
        }
    }

    /// The entries that are in memory.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The entries with their numbers; none if all of them are 0.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Entry)> + '_ {
        (self.range.start..).zip(self.entries.iter().copied())
    }

    /// Hand the whole table to `each`, `count` entries at once, ascending.
    ///
    /// # Errors
    /// Those of `each`; I/O errors.
    pub fn each(
        io: &mut dyn BlockIo,
        image: &Image,
        count: u64,
        each: &mut dyn FnMut(&Self) -> DriverResult<()>,
    ) -> DriverResult<()> {
        let mut holes = Holes::default();
        let (mut at, entries) = (0, image.layout.entries());
        while at < entries {
            let end = at.saturating_add(count).min(entries);
            each(&Self::read(io, image, &mut holes, at..end)?)?;
            at = end;
        }
        Ok(())
    }
}
