//! What is written between two flushes: data of some pieces, and the bitmaps and entries that will say that it is there.

use crate::image::Image;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, Extent, OrderedWriter, ReadBelow};
use instar_vhd_format::{Bitmap, SECTOR};

/// Requests that are collected before they are submitted.
const REQUESTS: usize = 4096;
/// Bytes of bitmaps and of filled sectors that are collected, at most.
const BYTES: usize = 1 << 20;

/// A new block.
#[derive(Debug)]
pub struct Fresh {
    /// Byte offset of its bitmap in the file.
    pub place: u64,
    /// All of its bitmap.
    pub bitmaps: Vec<Bitmap>,
}

/// A sector of the bitmap of a block that was there before.
#[derive(Debug)]
pub struct Marked {
    /// Byte offset of the sector of bitmap in the file.
    pub place: u64,
    /// Byte offset of the piece's data.
    pub data: u64,
    pub bitmap: Bitmap,
    /// It differs from what is in the file.
    pub changed: bool,
}

/// What is collected.
#[derive(Debug, Default)]
pub struct Group {
    /// Data, in the order in which it is to be written.
    pub data: Batch,
    /// Sectors that are filled up, which `data` writes.
    sectors: Vec<Vec<u8>>,
    /// New blocks, by their number.
    pub fresh: BTreeMap<u64, Fresh>,
    /// Sectors of bitmap, by the number of their piece.
    pub marked: BTreeMap<u64, Marked>,
    bytes: usize,
}

/// Where a part of an extent goes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// First guest byte of the piece.
    pub start: u64,
    /// Byte offset of the piece's data in the file.
    pub data: u64,
    /// The file reads as zeroes there, unless this group writes to it.
    pub blank: bool,
}

impl Group {
    /// Whether it is time to write.
    pub fn is_full(&self) -> bool {
        self.data.len() >= REQUESTS || self.bytes >= BYTES
    }

    /// Take a new block in: all of it is there in a dynamic disk, as QEMU has it, and reads as zeroes; in a differencing one,
    /// nothing is yet.
    pub fn add_block(&mut self, image: &Image, block: u64, place: u64) -> DriverResult<()> {
        let sectors = usize::try_from(image.header.bitmap_bytes() / SECTOR).map_err(|_| overflow("a bitmap"))?;
        let bitmap = if image.has_parent() { Bitmap::EMPTY } else { Bitmap::FULL };
        self.bytes += sectors * 512;
        self.fresh.insert(block, Fresh { place, bitmaps: vec![bitmap; sectors] });
        Ok(())
    }

    /// The sector of bitmap of a piece of a block that is there; `read` is what the file says.
    pub fn mark(&mut self, piece: u64, read: Marked) {
        self.bytes += 512;
        self.marked.insert(piece, read);
    }

    /// Write a part of an extent to its place, and say in its bitmap that it is there. A sector that is written in part and was
    /// not there is filled up with what showed: from below, or zeroes.
    pub fn add(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (part, target): (&Extent, Target),
        bitmap: &mut Bitmap,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<bool> {
        let within = part.guest_offset.checked_sub(target.start).ok_or_else(|| overflow("a piece"))?;
        let end = within.checked_add(part.length).ok_or_else(|| overflow("a piece"))?;
        let (first, behind) = (within / SECTOR, end.div_ceil(SECTOR));
        let cut = [(first, within), (behind.saturating_sub(1), end)].map(|(sector, edge)| (sector, edge % SECTOR != 0));
        let index = |sector: u64| usize::try_from(sector).map_err(|_| overflow("a sector"));
        for (number, (sector, is_cut)) in cut.into_iter().enumerate() {
            let twice = number == 1 && cut[0] == (sector, true);
            if is_cut && !twice && !bitmap.has(index(sector)?) {
                let mut bytes = vec![0; 512];
                if image.has_parent() {
                    below.read(io, target.start + sector * SECTOR, &mut bytes)?;
                }
                let to = target.data + sector * SECTOR;
                self.data.push(Request::write(image.device, to, bytes.as_ptr() as u64, SECTOR));
                self.sectors.push(bytes);
                self.bytes += 512;
            }
        }
        let changed = bitmap.set(index(first)?..index(behind)?);
        let whole = !cut[0].1 && !cut[1].1;
        if !(part.is_zero() && target.blank && whole) {
            self.data.push(part.request(image.device, target.data + within)?);
        }
        Ok(changed)
    }

    /// Whether anything has to be said of the data: if not, it replaces what was there before, and needs no flush.
    pub fn says_nothing(&self) -> bool {
        self.fresh.is_empty() && !self.marked.values().any(|marked| marked.changed)
    }

    /// Write the bitmaps of new blocks, which no entry names yet.
    pub fn push_bitmaps(&mut self, device: u32) {
        for fresh in self.fresh.values() {
            let length = fresh.bitmaps.len() as u64 * SECTOR;
            self.data.push(Request::write(device, fresh.place, fresh.bitmaps.as_ptr() as u64, length));
        }
    }

    /// Say that everything is there: entries of new blocks, bitmaps of others. Each is within one sector.
    pub fn publish(&mut self, io: &mut dyn BlockIo, image: &Image, out: &mut OrderedWriter) -> DriverResult<()> {
        let entry = |fresh: &Fresh| u32::try_from(fresh.place / SECTOR).map_err(|_| overflow("the place of a block"));
        let entries = self.fresh.values().map(|fresh| Ok(entry(fresh)?.to_be_bytes()));
        let entries = entries.collect::<DriverResult<Vec<[u8; 4]>>>()?;
        let mut batch = Batch::new();
        for (block, bytes) in self.fresh.keys().zip(&entries) {
            // Entries that follow each other do so in memory, too: they are written at once.
            batch.push(Request::write(image.device, image.entry_place(*block), bytes.as_ptr() as u64, 4));
        }
        for marked in self.marked.values().filter(|marked| marked.changed) {
            batch.push(Request::write(image.device, marked.place, marked.bitmap.0.as_ptr() as u64, SECTOR));
        }
        batch.submit_to(io, out)?;
        *self = Self::default();
        Ok(())
    }
}
