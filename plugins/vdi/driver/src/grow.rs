//! Growing an image: more entries in the map, and then the size in the header.
//!
//! The order, and what a crash leaves:
//! 1. what the last block holds past the old end becomes zeroes, and where an image below would show there, the block gets a
//!    slot of its own. This is past the end of the disk, or what was seen anyway;
//! 2. *flush*; where the map has no room, [room is made](crate::relocate) for a longer one;
//! 3. the entries of the new blocks, behind those that count;
//! 4. *flush*; then the size and the number of entries, in one write within a sector. It is durable before any data arrives:
//!    that is preceded by the new `uuidModify`, and a flush of it.

use crate::image::Image;
use crate::map::{bytes_of, each_entry};
use crate::relocate::{relocate, Relocation};
use crate::write::Writer;
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::table::ClusterParts;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter, ReadBelow};
use instar_vdi_format::{Entry, ImageType, ENTRY_BYTES, SECTOR};

/// New entries that are written at once.
const CHUNK: u32 = 1 << 16;

/// How an image is to grow.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Entries of the map.
    pub blocks: u32,
    /// From this guest byte on what lies below reads as zeroes.
    pub below_length: u64,
    /// Room has to be made for the map.
    pub relocation: Option<Relocation>,
}

fn unsupported(image: &Image, text: impl Into<alloc::string::String>) -> DriverError {
    DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0)
}

impl Growth {
    /// Verify that the disk can become `disk_size` bytes long.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot, corruption, I/O errors.
    pub fn plan(io: &mut dyn BlockIo, image: &Image, disk_size: u64, below_length: u64) -> DriverResult<Self> {
        let header = &image.header;
        if header.image_type == ImageType::Static {
            return Err(unsupported(image, "a static image cannot grow: copy it into a dynamic one"));
        }
        if !disk_size.is_multiple_of(SECTOR) {
            return Err(unsupported(image, format!("the new size of {disk_size} bytes is no multiple of 512")));
        }
        let needed = disk_size.div_ceil(header.block_size);
        let needed = u32::try_from(needed).map_err(|_| unsupported(image, "the map cannot become as long as that"))?;
        let blocks = needed.max(header.blocks);
        let room = (header.data_offset - header.map_offset) / ENTRY_BYTES;
        let relocation = if u64::from(blocks) > room { Some(Relocation::plan(image, blocks)?) } else { None };
        each_entry(io, image, image.disk_blocks()..header.blocks, &mut |block, entry| match entry {
            Entry::Free | Entry::Zero => Ok(()),
            Entry::Slot(_) => {
                let place = crate::map::offset_of(image, block.into());
                Err(image.corrupt(place, format!("block {block} is there, and lies past the end of the disk")))
            }
        })?;
        Ok(Self { disk_size, blocks, below_length, relocation })
    }

    /// Slots that are needed besides those of what arrives: one for the last block, and those that are moved.
    pub fn slots(&self, used: u64) -> u64 {
        1 + self.relocation.map_or(0, |relocation| used.min(relocation.slots.into()))
    }

    /// Grow. Nothing of what arrives was written yet.
    ///
    /// # Errors
    /// I/O errors.
    pub fn apply(&self, io: &mut dyn BlockIo, writer: &mut Writer, below: &mut dyn ReadBelow) -> DriverResult<()> {
        self.cut_last_block(io, writer, below)?;
        writer.finish(io)?;
        let first = writer.image.disk_blocks();
        if let Some(relocation) = &self.relocation {
            relocate(io, writer, *relocation, self, first)?;
        } else {
            let map = writer.image.header.map_offset;
            self.write_entries(io, &mut writer.out, map, first..self.blocks, writer.image.header.block_size)?;
            writer.out.barrier(io)?;
            (writer.image.header.disk_size, writer.image.header.blocks) = (self.disk_size, self.blocks);
            writer.count(io)?;
        }
        // Flushed with what comes next: the new `uuidModify` in the same sector, or the end.
        writer.map.forget();
        Ok(())
    }

    /// Have the last block read as zeroes past the old end of the disk, wherever its bytes come from.
    fn cut_last_block(&self, io: &mut dyn BlockIo, writer: &mut Writer, below: &mut dyn ReadBelow) -> DriverResult<()> {
        let (size, block_size) = (writer.image.header.virtual_size(), writer.image.header.block_size);
        let within = size % block_size;
        if within == 0 {
            return Ok(());
        }
        let block = writer.image.disk_blocks() - 1;
        let end = writer.image.header.blocks;
        match writer.map.get(io, &writer.image, block, end)? {
            Entry::Slot(slot) => {
                writer.zero_part(slot, within, block_size - within);
                writer.submit(io)
            }
            // What is below shows up to the old end, and may go on behind it.
            Entry::Free if below.exists() && self.below_length > size => {
                let parts = ClusterParts { cluster: block.into(), parts: Vec::new() };
                writer.write_block(io, &parts, below)
            }
            Entry::Free | Entry::Zero => Ok(()),
        }
    }

    /// Write the entries of new blocks into a map that begins at byte `map`: zeroes where an image below would show.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_entries(
        &self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        map: u64,
        blocks: Range<u32>,
        block_size: u64,
    ) -> DriverResult<()> {
        let entry = |block: u32| {
            let shows = u64::from(block) * block_size < self.below_length;
            if shows { Entry::Zero } else { Entry::Free }.encode()
        };
        let mut first = blocks.start;
        while first < blocks.end {
            let end = first.saturating_add(CHUNK).min(blocks.end);
            let entries: Vec<u32> = (first..end).map(entry).collect();
            let at = (u64::from(first) * ENTRY_BYTES).checked_add(map).ok_or_else(|| overflow("the map"))?;
            out.write(io, at, &bytes_of(&entries))?;
            first = end;
        }
        Ok(())
    }
}
