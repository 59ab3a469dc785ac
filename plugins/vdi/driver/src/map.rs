//! The block map: a [`Table`] in which 0 is slot 0, so that a hole of the file says as much as any other part of it.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::table::{EntryKind, Little32, Table};
use instar_guest_sdk::{overflow, BlockIo, DriverResult, OrderedWriter};
use instar_vdi_format::{Entry, ENTRY_BYTES};

/// Entries that are read at once where all of them are looked at.
const CHUNK: u32 = 1 << 14;

/// The map of an open image.
#[derive(Debug)]
pub struct Map {
    table: Table<Little32>,
}

/// What is done with each entry.
pub type EachEntry<'a> = &'a mut dyn FnMut(u32, Entry) -> DriverResult<()>;

impl Map {
    /// Nothing of it was read. `cache_bytes` bounds what is held of it for reading; 0: no bound.
    pub fn new(image: &Image, cache_bytes: u64) -> Self {
        Self { table: Table::dense(image.device, cache_bytes) }
    }

    /// The entry of `block`. If it has to be read, those up to `end` are read with it, as far as there is room.
    ///
    /// # Errors
    /// I/O errors; an arithmetic guard for a block that has no entry.
    pub fn get(&mut self, io: &mut dyn BlockIo, image: &Image, block: u32, end: u32) -> DriverResult<Entry> {
        if block >= image.header.blocks {
            return Err(overflow("a block"));
        }
        let [at, end] = [block, end.min(image.header.blocks)].map(|block| offset_of(image, block.into()));
        self.table.get(io, at, end).map(Entry::decode)
    }

    /// Change an entry in memory. There has to be [room](Self::is_full) for it.
    ///
    /// # Errors
    /// As [`Map::get`].
    pub fn set(&mut self, io: &mut dyn BlockIo, image: &Image, block: u32, entry: Entry) -> DriverResult<()> {
        if block >= image.header.blocks {
            return Err(overflow("a block"));
        }
        let [at, end] = [block, image.header.blocks].map(|block| offset_of(image, block.into()));
        self.table.set(io, at, end, entry.encode())
    }

    /// Whether changed entries are held.
    pub fn is_changed(&self) -> bool {
        self.table.is_changed()
    }

    /// Whether changed entries have to be written before others are changed.
    pub fn is_full(&self) -> bool {
        self.table.is_full()
    }

    /// Flush, and write the changed entries, as [`Table::write`] does.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        self.table.write(io, out)
    }

    /// Drop what was read: the map in the file is another one now.
    pub fn forget(&mut self) {
        self.table.forget();
    }
}

/// Hand the entries of these blocks to `each`, as they stand in the file.
///
/// # Errors
/// Those of `each`; I/O errors.
pub fn each_entry(io: &mut dyn BlockIo, image: &Image, blocks: Range<u32>, each: EachEntry<'_>) -> DriverResult<()> {
    each_chunk(io, image, blocks, &mut |_, first, entries| {
        entries.iter().zip(first..).try_for_each(|(&entry, block)| each(block, Entry::decode(entry)))
    })
}

/// What is done with the entries of some blocks, from the first on.
pub type EachChunk<'a> = &'a mut dyn FnMut(&mut dyn BlockIo, u32, &[u32]) -> DriverResult<()>;

/// Hand the entries of these blocks to `each`, some at once.
///
/// # Errors
/// Those of `each`; I/O errors.
pub fn each_chunk(io: &mut dyn BlockIo, image: &Image, blocks: Range<u32>, each: EachChunk<'_>) -> DriverResult<()> {
    let mut first = blocks.start;
    while first < blocks.end {
        let end = first.saturating_add(CHUNK).min(blocks.end);
        let count = usize::try_from(end - first).map_err(|_| overflow("the map"))?;
        let mut bytes = vec![0; count.checked_mul(4).ok_or_else(|| overflow("the map"))?];
        io.read(image.device, offset_of(image, first.into()), &mut bytes)?;
        let entries: Vec<u32> = bytes.chunks_exact(4).map(Little32::decode).collect();
        each(io, first, &entries)?;
        first = end;
    }
    Ok(())
}

/// The bytes of entries.
pub fn bytes_of(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// Where the entry of a block stands in the file.
pub fn offset_of(image: &Image, block: u64) -> u64 {
    image.header.map_offset + block * ENTRY_BYTES
}
