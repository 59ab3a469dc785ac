//! An open dynamic or differencing disk: footers and header, and where everything stands in the file.

use crate::batmap::Batmap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{checked_end, overflow, DriverError, DriverResult};
use instar_vhd_format::{
    Footers, Header, Kind, BATMAP_HEADER_BYTES, DATA_ALIGNMENT, FOOTER_BYTES, HEADER_BYTES, MAX_LOCATOR_BYTES, SECTOR,
    UNUSED,
};

/// Guest bytes that a sector of bitmap stands for.
const PIECE: u64 = 4096 * SECTOR;

/// A piece of metadata: its bytes, and what it is.
pub type Metadata = (Range<u64>, &'static str);

/// What the name of a parent is, among metadata.
pub const LOCATOR: &str = "parent locator";

/// An open image with blocks.
#[derive(Debug)]
pub struct Image {
    pub device: u32,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// The device cannot change its length: its footer stays at the end.
    pub fixed_length: bool,
    pub footers: Footers,
    pub header: Header,
    /// Bytes of the disk, whole sectors.
    pub size: u64,
    /// XenServer's, if there is one.
    pub batmap: Option<Batmap>,
    /// Where no block may be: [`metadata`](Self::metadata) but the footer at the end.
    pub taken: Vec<Metadata>,
    /// The code of what no image may say.
    pub corrupt: ErrorCode,
}

impl Image {
    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    /// What is not in a block shows from a parent.
    pub fn has_parent(&self) -> bool {
        self.footers.footer.kind() == Kind::Differencing
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.header.block_size())
    }

    /// Guest bytes of a piece: what one sector of a block's bitmap stands for, or a whole block that is smaller.
    pub fn piece_bytes(&self) -> u64 {
        self.header.block_size().min(PIECE)
    }

    /// Pieces of a block.
    pub fn pieces_per_block(&self) -> u64 {
        self.header.block_size() / self.piece_bytes()
    }

    /// Byte offset in the file of a block's entry.
    pub fn entry_place(&self, block: u64) -> u64 {
        // Within the table, which is in the file.
        self.header.table_offset().saturating_add(block.saturating_mul(4))
    }

    /// Where the footer at the end begins, or the file ends if there is none: blocks end before.
    pub fn data_end(&self) -> u64 {
        self.footers.tail.map_or(self.file_length, |(offset, _)| offset)
    }

    /// Byte offset in the file of a block's bitmap, by the block's entry; `None` for one that is not there.
    ///
    /// # Errors
    /// Corruption if any of the block that belongs to the disk is not in the file, or is metadata.
    pub fn block_place(&self, block: u64, entry: u32) -> DriverResult<Option<u64>> {
        if entry == UNUSED {
            return Ok(None);
        }
        let place = u64::from(entry) * SECTOR;
        let start = block.checked_mul(self.header.block_size()).ok_or_else(|| overflow("a block"))?;
        let visible = self.size.saturating_sub(start).min(self.header.block_size());
        if checked_end(place, self.header.bitmap_bytes() + visible, self.data_end()).is_none() {
            let text = format!("block {block}, at sector {entry}, goes past the end of the file");
            return Err(self.corrupt(self.entry_place(block), text));
        }
        // The last block of a file may be cut.
        let end = place.saturating_add(self.header.stride()).min(self.data_end());
        match self.taken.iter().find(|(range, _)| range.start < end && place < range.end) {
            None => Ok(Some(place)),
            Some((range, what)) => {
                let text = format!("block {block}, at sector {entry}, overlaps the {what} at byte {}", range.start);
                Err(self.corrupt(self.entry_place(block), text))
            }
        }
    }

    /// Verify that there is an entry for each block, in the file.
    ///
    /// # Errors
    /// Corruption.
    pub fn verify_table_place(&self) -> DriverResult<()> {
        let (entries, blocks) = (u64::from(self.header.entries()), self.blocks());
        let place = self.footers.footer.data_offset();
        if entries < blocks {
            let text = format!("the block allocation table has {entries} entries, and the disk has {blocks} blocks");
            return Err(self.corrupt(place, text));
        }
        if checked_end(self.header.table_offset(), entries * 4, self.file_length).is_none() {
            let text = format!(
                "the block allocation table of {entries} entries at byte {} goes past the end of the file",
                self.header.table_offset()
            );
            return Err(self.corrupt(place, text));
        }
        Ok(())
    }

    /// Everything but blocks, ascending.
    pub fn metadata(&self) -> Vec<Metadata> {
        let at = |offset: u64, length: u64| offset..offset.saturating_add(length);
        let mut parts = vec![
            (0..FOOTER_BYTES as u64, "copy of the footer"),
            (at(self.footers.footer.data_offset(), HEADER_BYTES as u64), "dynamic header"),
            (at(self.header.table_offset(), self.header.table_bytes()), "block allocation table"),
        ];
        if let Some(batmap) = &self.batmap {
            parts.push((at(batmap.header_place, BATMAP_HEADER_BYTES as u64), "header of the batmap"));
            parts.push((at(batmap.header.offset(), batmap.header.map_bytes()), "batmap"));
        }
        // Names that make no sense are not read, and are in nobody's way.
        let named = self.header.locators().filter(|locator| u64::from(locator.length) <= MAX_LOCATOR_BYTES);
        let named = named.filter(|locator| checked_end(locator.offset, locator.taken(), self.file_length).is_some());
        parts.extend(named.map(|locator| (at(locator.offset, locator.taken()), LOCATOR)));
        if let Some((offset, _)) = self.footers.tail {
            parts.push((at(offset, FOOTER_BYTES as u64), "footer"));
        }
        parts.retain(|(range, _)| !range.is_empty());
        parts.sort_by_key(|(range, _)| range.start);
        parts
    }

    /// Find out again where no block may be, once the table is where it is.
    pub fn take_metadata(&mut self) {
        let tail = self.footers.tail.map(|(offset, _)| offset);
        self.taken = self.metadata();
        self.taken.retain(|(range, _)| Some(range.start) != tail);
    }

    /// The end of all metadata but the footer at the end, in bytes, at a sector: that footer may stand there.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn metadata_end(&self) -> DriverResult<u64> {
        let ends = self.taken.iter().map(|(range, _)| range.end);
        ends.max().unwrap_or(0).checked_next_multiple_of(SECTOR).ok_or_else(|| overflow("the end of the metadata"))
    }

    /// Where a block may begin, at or behind byte `free`, a multiple of a sector: so that its data begins at a page, unless
    /// that wastes too much.
    pub fn place_behind(&self, free: u64) -> Option<u64> {
        let bitmap = self.header.bitmap_bytes();
        if self.header.block_size() < 16 * DATA_ALIGNMENT {
            return Some(free);
        }
        free.checked_add(bitmap)?.checked_next_multiple_of(DATA_ALIGNMENT)?.checked_sub(bitmap)
    }
}
