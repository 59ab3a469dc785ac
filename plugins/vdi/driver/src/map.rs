//! The block map, read in chunks, and written in pages of which only the changed part goes to the disk.

use crate::image::Image;
use alloc::collections::btree_map::{BTreeMap, Entry as Place};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, OrderedWriter};
use instar_vdi_format::{Entry, ENTRY_BYTES};

/// Entries of a page: 4 KiB of the map.
const PAGE: u32 = 1024;
/// Entries that are read at once, at most and at least.
const CHUNK: u32 = 16 * PAGE;
const LEAST_CHUNK: u32 = 128;
/// Changed pages that are held at most: 4 MiB. Whoever changes more entries writes them in between.
const CHANGED_PAGES: usize = 1024;

/// A page of which some entries differ from what is in the file.
#[derive(Debug)]
struct Page {
    entries: Vec<u32>,
    /// The first and the last of them that differ.
    changed: (usize, usize),
}

/// The map of an open image.
#[derive(Debug)]
pub struct Map {
    /// The entries that were read last, and the number of the first of them.
    chunk: Vec<u32>,
    first: u32,
    /// Entries that are read at once.
    most: u32,
    changed: BTreeMap<u32, Page>,
}

/// What is done with each entry.
pub type EachEntry<'a> = &'a mut dyn FnMut(u32, Entry) -> DriverResult<()>;

impl Map {
    /// Nothing of it was read. `cache_bytes` bounds what is held of it for reading; 0: no bound.
    pub fn new(cache_bytes: u64) -> Self {
        let bound = u32::try_from(cache_bytes / ENTRY_BYTES).unwrap_or(u32::MAX);
        let most = if bound == 0 { CHUNK } else { bound.clamp(LEAST_CHUNK, CHUNK) };
        Self { chunk: Vec::new(), first: 0, most, changed: BTreeMap::new() }
    }

    /// The entry of `block`. If it has to be read, those up to `end` are read with it, as far as there is room.
    ///
    /// # Errors
    /// I/O errors.
    pub fn get(&mut self, io: &mut dyn BlockIo, image: &Image, block: u32, end: u32) -> DriverResult<Entry> {
        if let Some(page) = self.changed.get(&(block / PAGE)) {
            let entry = page.entries.get((block % PAGE) as usize).ok_or_else(|| overflow("a block"))?;
            return Ok(Entry::decode(*entry));
        }
        let held = |map: &Self| {
            let index = usize::try_from(block.checked_sub(map.first)?).ok()?;
            map.chunk.get(index).copied()
        };
        if held(self).is_none() {
            let first = block - block % LEAST_CHUNK;
            let wanted = end.saturating_sub(first).clamp(LEAST_CHUNK, self.most);
            self.chunk = read(io, image, first..first.saturating_add(wanted).min(image.header.blocks))?;
            self.first = first;
        }
        held(self).map(Entry::decode).ok_or_else(|| overflow("a block"))
    }

    /// Change an entry in memory. There has to be [room](Self::is_full) for its page.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set(&mut self, io: &mut dyn BlockIo, image: &Image, block: u32, entry: Entry) -> DriverResult<()> {
        let (number, index) = (block / PAGE, (block % PAGE) as usize);
        let page = match self.changed.entry(number) {
            Place::Occupied(page) => page.into_mut(),
            Place::Vacant(place) => {
                let start = number * PAGE;
                let entries = read(io, image, start..start.saturating_add(PAGE).min(image.header.blocks))?;
                place.insert(Page { entries, changed: (index, index) })
            }
        };
        *page.entries.get_mut(index).ok_or_else(|| overflow("a block"))? = entry.encode();
        page.changed = (page.changed.0.min(index), page.changed.1.max(index));
        Ok(())
    }

    /// Whether changed entries are held.
    pub fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Whether changed entries have to be written before others are changed.
    pub fn is_full(&self) -> bool {
        self.changed.len() >= CHANGED_PAGES
    }

    /// Write the changed entries. An entry lies within a sector, so that each of them is there or not after a crash.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, io: &mut dyn BlockIo, image: &Image, out: &mut OrderedWriter) -> DriverResult<()> {
        let pages = core::mem::take(&mut self.changed);
        self.forget();
        let mut buffers: Vec<Vec<u8>> = Vec::with_capacity(pages.len());
        let mut requests = Vec::with_capacity(pages.len());
        for (number, page) in &pages {
            let (first, last) = page.changed;
            let bytes = bytes_of(page.entries.get(first..=last).unwrap_or_default());
            let offset = offset_of(image, u64::from(*number) * u64::from(PAGE) + first as u64);
            requests.push(Request::write(image.device, offset, bytes.as_ptr() as u64, bytes.len() as u64));
            buffers.push(bytes);
        }
        out.run(io, &mut requests)
    }

    /// Drop what was read: the map in the file is another one now.
    pub fn forget(&mut self) {
        self.chunk = Vec::new();
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
        let entries = read(io, image, first..end)?;
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

fn read(io: &mut dyn BlockIo, image: &Image, blocks: Range<u32>) -> DriverResult<Vec<u32>> {
    let count = usize::try_from(blocks.end.saturating_sub(blocks.start)).map_err(|_| overflow("the map"))?;
    let mut bytes = vec![0; count.checked_mul(4).ok_or_else(|| overflow("the map"))?];
    io.read(image.device, offset_of(image, blocks.start.into()), &mut bytes)?;
    let entry = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(bytes.chunks_exact(4).map(entry).collect())
}
