//! What the image holds of a piece of the disk: the entry of its block, and its sector of the block's bitmap. What was
//! read last is kept, because a request for one piece is usually followed by one for the next, or for the same one.

use crate::image::Image;
use crate::table::Table;
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vhd_format::{Bitmap, SECTOR};

/// Entries of the table that are read at once, at most: 16 KiB.
const ENTRIES: u64 = 4096;
/// Pieces whose bitmaps are read at once: 32 KiB of them.
const PIECES: u64 = 64;

/// What the image holds of a piece.
#[derive(Clone, Debug)]
pub enum Held {
    /// Its block is not there.
    Nothing,
    /// All of its sectors; the data begins at this byte of the file.
    All(u64),
    /// Some of them.
    Some(u64, Box<Bitmap>),
}

/// The entries and bitmaps that were read last.
#[derive(Debug, Default)]
pub struct Lookup {
    table: Table,
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

    /// Forget everything: the image has changed.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// The entry of a block; those up to `limit` may be asked for next.
    ///
    /// # Errors
    /// I/O errors.
    pub fn entry(&mut self, io: &mut dyn BlockIo, image: &Image, block: u64, limit: u64) -> DriverResult<u32> {
        if let Some(entry) = self.table.get(block) {
            return Ok(entry);
        }
        self.table = Table::read(io, image, block..limit.clamp(block + 1, block + ENTRIES))?;
        self.table.get(block).ok_or_else(|| overflow("a block"))
    }

    fn read(&mut self, io: &mut dyn BlockIo, image: &Image, pieces: Range<u64>, limit: u64) -> DriverResult<Vec<Held>> {
        let per_block = image.pieces_per_block();
        let mut held = Vec::new();
        let mut bitmaps = Vec::new();
        for piece in pieces {
            let (block, within) = (piece / per_block, piece % per_block);
            let entry = self.entry(io, image, block, limit.div_ceil(per_block))?;
            let Some(place) = image.block_place(block, entry)? else {
                held.push(Held::Nothing);
                continue;
            };
            let data = place + image.header.bitmap_bytes() + within * image.piece_bytes();
            if image.batmap.as_ref().is_none_or(|batmap| !batmap.is_full(block)) {
                bitmaps.push((held.len(), place + within * SECTOR));
            }
            held.push(Held::All(data));
        }
        let mut read = vec![Bitmap::EMPTY; bitmaps.len()];
        let request = |(bitmap, (_, place)): (&mut Bitmap, &(usize, u64))| {
            Request::read(image.device, *place, bitmap.0.as_mut_ptr() as u64, SECTOR)
        };
        let mut requests: Vec<Request> = read.iter_mut().zip(&bitmaps).map(request).collect();
        if !requests.is_empty() {
            io.run(&mut requests)?;
        }
        for (bitmap, (index, _)) in read.into_iter().zip(bitmaps) {
            let Some(held) = held.get_mut(index) else { continue };
            if let (Held::All(data), true) = (&*held, bitmap != Bitmap::FULL) {
                *held = Held::Some(*data, Box::new(bitmap));
            }
        }
        Ok(held)
    }
}
