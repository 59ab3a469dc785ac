//! What is written between two entries of the log: data of some pieces, and what the next entry will say of them.

use crate::image::Image;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, Extent, ReadBelow};
use instar_vhdx_format::Bits;

/// Requests that are collected before they are submitted.
const REQUESTS: usize = 4096;
/// Bytes of bits and of filled sectors that are collected, at most.
const BYTES: usize = 1 << 20;
/// Pages that the next entry of the log will replace, at most, before one more part is collected. That may add the bits of a
/// whole block, which are 16 pages, and two of the table.
const PAGES: usize = 48;

/// A new block.
#[derive(Debug)]
pub struct Fresh {
    /// Byte offset in the file.
    pub place: u64,
    /// What is not written of it shows from the parent.
    pub partial: bool,
    /// Sectors that were written.
    pub covered: u64,
}

impl Fresh {
    /// Whether all of a new block is in the file.
    pub fn is_whole(&self, image: &Image, block: u64) -> bool {
        !self.partial || self.covered.saturating_mul(image.layout.sector) >= image.layout.visible(block)
    }
}

/// A piece of a block whose bitmap counts.
#[derive(Debug)]
pub struct Marked {
    /// Byte offset of the piece's data.
    pub data: u64,
    pub bits: Bits,
    /// The bits differ from those in the file, or the file's bits mean nothing.
    pub changed: bool,
    /// The file reads as zeroes there, unless this group writes to it.
    pub blank: bool,
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
    /// Blocks that become zeroes, and take no room.
    pub zeroed: BTreeSet<u64>,
    /// Pieces whose bits may change, by their number.
    pub marked: BTreeMap<u64, Marked>,
    /// Pages of the table, and pages of bits.
    pages: [BTreeSet<u64>; 2],
    bytes: usize,
}

impl Group {
    /// Whether it is time to write.
    pub fn is_full(&self) -> bool {
        let pages = self.pages[0].len() + self.pages[1].len();
        self.data.len() >= REQUESTS || self.bytes >= BYTES || pages >= PAGES
    }

    /// Whether anything has to be said of the data: if not, it replaces what was there before, and needs no flush.
    pub fn says_nothing(&self) -> bool {
        self.fresh.is_empty() && self.zeroed.is_empty() && !self.marked.values().any(|marked| marked.changed)
    }

    fn name_entry(&mut self, entry: u64) {
        self.pages[0].insert(entry / 512);
    }

    /// A block becomes zeroes.
    pub fn zero(&mut self, image: &Image, block: u64) {
        self.name_entry(image.layout.payload_entry(block));
        self.zeroed.insert(block);
    }

    /// Take a new block in. Where a parent shows, whatever the bits of it say has to be replaced: nobody looked at them while
    /// the block was not there.
    pub fn add_block(&mut self, image: &Image, block: u64, place: u64, partial: bool) -> DriverResult<()> {
        self.name_entry(image.layout.payload_entry(block));
        self.zeroed.remove(&block);
        if partial {
            self.name_entry(image.layout.bitmap_entry(block));
            let (pieces, bytes) = (image.layout.pieces_per_block(), Image::in_memory(image.layout.bits_of_piece(0).1)?);
            for within in 0..pieces {
                let data = place.saturating_add(within.saturating_mul(image.layout.piece_bytes()));
                let marked = Marked { data, bits: Bits::none(bytes), changed: true, blank: true };
                self.mark(image, block.saturating_mul(pieces).saturating_add(within), marked);
            }
        }
        self.fresh.insert(block, Fresh { place, partial, covered: 0 });
        Ok(())
    }

    /// A piece whose bits may change.
    pub fn mark(&mut self, image: &Image, piece: u64, marked: Marked) {
        let (_, bytes) = image.layout.bits_of_piece(piece);
        self.pages[1].insert(piece.saturating_mul(bytes) / 4096);
        self.bytes += marked.bits.0.len();
        self.marked.insert(piece, marked);
    }

    /// Write a part of an extent into a marked piece that begins at guest byte `start`, and set its bits. A sector that is
    /// written in part and was not there is filled up with what showed: from below.
    pub fn add(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (part, piece, start): (&Extent, u64, u64),
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let sector = image.layout.sector;
        let within = part.guest_offset.checked_sub(start).ok_or_else(|| overflow("a piece"))?;
        let end = within.checked_add(part.length).ok_or_else(|| overflow("a piece"))?;
        let (first, behind) = (within / sector, end.div_ceil(sector));
        let marked = self.marked.get_mut(&piece).ok_or_else(|| overflow("a piece"))?;
        let cut = [(first, within), (behind.saturating_sub(1), end)];
        let cut = cut.map(|(number, edge)| (number, !edge.is_multiple_of(sector)));
        let index = |number: u64| usize::try_from(number).map_err(|_| overflow("a sector"));
        for (number, (at, is_cut)) in cut.into_iter().enumerate() {
            let twice = number == 1 && cut[0] == (at, true);
            if is_cut && !twice && !marked.bits.has(index(at)?) {
                let mut bytes = vec![0; Image::in_memory(sector)?];
                below.read(io, start + at * sector, &mut bytes)?;
                self.data.push(Request::write(image.device, marked.data + at * sector, bytes.as_ptr() as u64, sector));
                self.bytes += bytes.len();
                self.sectors.push(bytes);
            }
        }
        let added = marked.bits.set(index(first)?..index(behind)?);
        marked.changed |= added > 0;
        if let Some(fresh) = self.fresh.get_mut(&(piece / image.layout.pieces_per_block())) {
            fresh.covered += added as u64;
        }
        let whole = !cut[0].1 && !cut[1].1;
        if !(part.is_zero() && marked.blank && whole) {
            self.data.push(part.request(image.device, marked.data + within)?);
        }
        Ok(())
    }
}
