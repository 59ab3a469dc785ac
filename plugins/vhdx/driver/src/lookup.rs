//! What the image holds of a piece of the disk: the entry of its block, and its part of the sector bitmap. What was
//! read last is kept, because a request for one piece is usually followed by one for the next, or for the same one.

use crate::image::{Image, Place};
use crate::table::Table;
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, Holes};
use instar_vhdx_format::{Bits, Entry};

/// Entries of the table that are read at once, at most: 32 KiB.
const ENTRIES: u64 = 4096;
/// Pieces whose bitmaps are read at once, at most: 64 KiB of them.
const PIECES: u64 = 16;

/// What the image holds of a piece.
#[derive(Clone, Debug)]
pub enum Held {
    /// Nothing.
    Nothing,
    /// Zeroes.
    Zero,
    /// All of its sectors; the data begins at this byte of the file.
    All(u64),
    /// Some of them: where the data begins, and the bits.
    Some(u64, Box<Bits>),
}

/// The entries and bitmaps that were read last.
#[derive(Debug, Default)]
pub struct Lookup {
    holes: Holes,
    table: Table,
    /// Entries of sector bitmap blocks stand far from those that they go with.
    bitmaps: Table,
    first: u64,
    held: Vec<Held>,
}

impl Lookup {
    /// Look a piece up, by its number; those up to `limit` may be asked for next.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn piece(&mut self, io: &mut dyn BlockIo, image: &Image, piece: u64, limit: u64) -> DriverResult<&Held> {
        if !(self.first..self.first.saturating_add(self.held.len() as u64)).contains(&piece) {
            self.held.clear();
            self.held = self.read(io, image, piece..limit.clamp(piece + 1, piece + PIECES), limit)?;
            self.first = piece;
        }
        let index = usize::try_from(piece - self.first).map_err(|_| overflow("a piece"))?;
        self.held.get(index).ok_or_else(|| overflow("a piece"))
    }

    /// The first piece from this one on, up to `limit`, of which the image may hold something. No more of the table is read
    /// than is kept.
    ///
    /// # Errors
    /// I/O errors.
    pub fn next_piece(&mut self, io: &mut dyn BlockIo, image: &Image, piece: u64, limit: u64) -> DriverResult<u64> {
        let per_block = image.layout.pieces_per_block();
        let block = piece / per_block;
        self.entry(io, image, block, limit.div_ceil(per_block))?;
        let entry = image.layout.payload_entry(block);
        let free = self.table.nothing_until(entry);
        if free <= entry {
            return Ok(piece);
        }
        // The entry behind may be one of a bitmap, whose blocks come first.
        let next = image.layout.entry_of(free).unwrap_or_else(|first| first + image.layout.chunk_ratio());
        Ok(next.saturating_mul(per_block).clamp(piece, limit.max(piece)))
    }

    /// Forget everything: the image has changed.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// The entry of a payload block; those up to `limit` may be asked for next.
    ///
    /// # Errors
    /// I/O errors.
    pub fn entry(&mut self, io: &mut dyn BlockIo, image: &Image, block: u64, limit: u64) -> DriverResult<Entry> {
        let entry = image.layout.payload_entry(block);
        if let Some(entry) = self.table.get(entry) {
            return Ok(entry);
        }
        let wanted = image.layout.payload_entry(limit).clamp(entry + 1, entry + ENTRIES);
        self.table = Table::read(io, image, &mut self.holes, entry..wanted)?;
        self.table.get(entry).ok_or_else(|| overflow("a block"))
    }

    /// Where the sector bitmap block of a payload block is, if it is there.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn bitmap(&mut self, io: &mut dyn BlockIo, image: &Image, block: u64) -> DriverResult<Option<u64>> {
        let entry = image.layout.bitmap_entry(block);
        if entry >= image.layout.entries() {
            return Ok(None);
        }
        if self.bitmaps.get(entry).is_none() {
            self.bitmaps = Table::read(io, image, &mut self.holes, entry..entry + 1)?;
        }
        image.bitmap_place(block, self.bitmaps.get(entry).unwrap_or_default())
    }

    fn read(&mut self, io: &mut dyn BlockIo, image: &Image, pieces: Range<u64>, limit: u64) -> DriverResult<Vec<Held>> {
        let layout = image.layout;
        let (per_block, bytes) = (layout.pieces_per_block(), Image::in_memory(layout.bits_of_piece(0).1)?);
        let mut held = Vec::new();
        // Which piece, and where its bits stand.
        let mut wanted: Vec<(usize, u64)> = Vec::new();
        for piece in pieces {
            let (block, within) = (piece / per_block, piece % per_block * layout.piece_bytes());
            let entry = self.entry(io, image, block, limit.div_ceil(per_block))?;
            held.push(match image.block_place(block, entry)? {
                Place::Nowhere => Held::Nothing,
                Place::Zero => Held::Zero,
                Place::Whole(data) => Held::All(data + within),
                Place::Partial(data) => {
                    let Some(bitmap) = self.bitmap(io, image, block)? else {
                        let text = format!("block {block} is partially present, and its sector bitmap is not there");
                        return Err(image.corrupt(image.entry_place(layout.payload_entry(block)), text));
                    };
                    wanted.push((held.len(), bitmap + layout.bits_of_piece(piece).0));
                    Held::All(data + within)
                }
            });
        }
        let mut read = vec![0u8; bytes.checked_mul(wanted.len()).ok_or_else(|| overflow("sector bitmaps"))?];
        let mut batch = Batch::new();
        for ((_, place), buffer) in wanted.iter().zip(read.chunks_exact_mut(bytes)) {
            // Bits of blocks that follow each other do so in the file, too: they are read at once.
            batch.push(Request::read(image.device, *place, buffer.as_mut_ptr() as u64, bytes as u64));
        }
        batch.submit(io)?;
        for ((index, place), bits) in wanted.into_iter().zip(read.chunks_exact_mut(bytes)) {
            image.see(place, bits);
            let Some(held) = held.get_mut(index) else { continue };
            if let Held::All(data) = *held {
                *held = Held::Some(data, Box::new(Bits(bits.to_vec())));
            }
        }
        Ok(held)
    }
}
