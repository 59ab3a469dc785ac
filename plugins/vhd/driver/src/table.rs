//! The block allocation table, a window of it at a time: it may be as long as the disk is large.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vhd_format::UNUSED;

/// Entries of a sector.
const IN_A_SECTOR: u64 = 128;

/// Entries in memory.
#[derive(Debug, Default)]
pub struct Table {
    /// The block of the first.
    pub first: u64,
    pub entries: Vec<u32>,
}

impl Table {
    /// Read the entries of these blocks, in whole sectors as far as the disk goes.
    ///
    /// # Errors
    /// I/O errors.
    pub fn read(io: &mut dyn BlockIo, image: &Image, blocks: Range<u64>) -> DriverResult<Self> {
        let first = blocks.start - blocks.start % IN_A_SECTOR;
        let end = blocks.end.next_multiple_of(IN_A_SECTOR).min(image.blocks()).max(first);
        let count = usize::try_from(end - first).map_err(|_| overflow("the block allocation table"))?;
        let mut bytes = vec![0u8; count.checked_mul(4).ok_or_else(|| overflow("the block allocation table"))?];
        io.read(image.device, image.entry_place(first), &mut bytes)?;
        let entry = |bytes: &[u8]| bytes.first_chunk().map_or(UNUSED, |entry| u32::from_be_bytes(*entry));
        Ok(Self { first, entries: bytes.chunks_exact(4).map(entry).collect() })
    }

    /// The entry of a block, if it is in memory.
    pub fn get(&self, block: u64) -> Option<u32> {
        let index = block.checked_sub(self.first)?;
        self.entries.get(usize::try_from(index).ok()?).copied()
    }

    /// The blocks with their entries.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        (self.first..).zip(self.entries.iter().copied())
    }

    /// Hand the whole table to `each`, `count` entries at once, ascending.
    ///
    /// # Errors
    /// Those of `each`; I/O errors.
    pub fn each(
        io: &mut dyn BlockIo,
        image: &Image,
        count: u64,
        each: &mut dyn FnMut(&mut dyn BlockIo, &Self) -> DriverResult<()>,
    ) -> DriverResult<()> {
        let blocks = image.blocks();
        let mut at = 0;
        while at < blocks {
            let end = at.saturating_add(count).min(blocks);
            let table = Self::read(io, image, at..end)?;
            each(io, &table)?;
            at = end;
        }
        Ok(())
    }
}
