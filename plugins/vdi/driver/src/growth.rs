//! How an image is to grow, planned before anything changes, and the entries that its map gets.

use crate::image::Image;
use crate::map::{bytes_of, each_entry};
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter};
use instar_vdi_format::{Entry, ImageType, ENTRY_BYTES, SECTOR};

/// New entries that are written at once.
const CHUNK: u32 = 1 << 16;
/// Most slots that are moved: what is known of them is held in memory. With blocks of 1 MiB that is a map of 1 TiB.
const MOST: u64 = 1 << 20;

/// How far the data area begins later.
#[derive(Clone, Copy, Debug)]
pub struct Relocation {
    /// Slots that the new map takes the place of.
    pub slots: u32,
    /// Where the data area begins then, in bytes.
    pub data_offset: u64,
}

impl Relocation {
    /// For a map of this many entries.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if the header cannot say where the data begins then.
    pub fn plan(image: &Image, blocks: u32) -> DriverResult<Self> {
        let size = image.header.stride();
        let slots = (u64::from(blocks) * ENTRY_BYTES).div_ceil(size);
        let data_offset = image.data_end(slots).filter(|&offset| offset <= u32::MAX.into() && slots <= MOST);
        match (u32::try_from(slots), data_offset) {
            (Ok(slots), Some(data_offset)) => Ok(Self { slots, data_offset }),
            _ => {
                let text = format!("a map of {blocks} entries has no place in front of the data");
                Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0))
            }
        }
    }
}

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
