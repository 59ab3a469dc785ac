//! Growth of a dynamic disk, in an order that every crash survives:
//!
//! 1. what of the last block lies behind the end of the disk becomes zero, and, if the table has no room for the new entries, a
//!    copy of it is made behind the last block. Nobody refers to any of that yet;
//! 2. one entry of the log sets the size, makes new entries 0 where the table had room for them, or has both region tables name
//!    the copy. A crash leaves the disk as it was, or as it will be.

use crate::growth::Growth;
use crate::image::Image;
use crate::journal::updates;
use crate::pages::{Pages, PAGE};
use crate::sink::VhdxSink;
use alloc::vec;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vhdx_format::{ids, Layout, Region, ALIGNMENT, MAX_SIZE, REGION_TABLE_BYTES, REGION_TABLE_OFFSETS};

impl VhdxSink {
    /// See [`Sink::grow`](instar_guest_sdk::Sink::grow).
    pub(crate) fn plan_growth(&self, size: u64) -> DriverResult<Growth> {
        let (image, layout) = (&self.image, self.image.layout);
        if layout.has_parent {
            let text =
                "a differencing VHDX has to be as large as its parent: let a larger copy of both take their place";
            return Err(self.refused(text));
        }
        if image.opened.metadata.leave_allocated {
            // A fixed disk has all of its blocks, and a block that is not there is nothing it may become (2.5.1.1, note 6).
            return Err(self.refused("a fixed VHDX does not grow: let a larger copy of it take its place"));
        }
        let size = size.checked_next_multiple_of(layout.sector).filter(|&size| size <= MAX_SIZE);
        let size = size.ok_or_else(|| self.refused("a VHDX has at most 64 TiB"))?;
        let bytes = Layout { size, ..layout }.entries() * 8;
        let room = u64::from(image.opened.bat.length);
        let moved = (bytes > room).then(|| u32::try_from(bytes.next_multiple_of(ALIGNMENT)));
        let moved = moved.transpose().map_err(|_| overflow("the block allocation table"))?;
        Ok(Growth { size, moved })
    }

    /// Grow, if that was agreed to.
    pub(crate) fn make_grow(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let Some(growth) = self.growth.take() else { return Ok(()) };
        self.zero_behind_the_end(io)?;
        let old = self.image.layout.entries();
        let (metadata, item) = (self.image.opened.metadata_region, self.image.opened.metadata.size_item);
        let mut pages = Pages::default();
        let place = metadata.offset.saturating_add(item.offset.into());
        pages.put(io, &self.image, place, &growth.size.to_le_bytes())?;
        let mut zeroes = None;
        if let Some(length) = growth.moved {
            let region = self.copy_table(io, length)?;
            for entry in self.image.opened.regions.regions.iter_mut().filter(|entry| entry.id == ids::BAT) {
                *entry = region;
            }
            self.image.opened.bat = region;
            self.put_region_tables(io, &mut pages)?;
        } else {
            let new = Layout { size: growth.size, ..self.image.layout }.entries();
            let (from, to) = (self.image.entry_place(old), self.image.entry_place(new));
            let first = from.next_multiple_of(PAGE).min(to);
            pages.put(io, &self.image, from, &vec![0; Image::in_memory(first - from)?])?;
            zeroes = Some(first..to.next_multiple_of(PAGE)).filter(|range| range.start < to);
        }
        self.journal.commit(io, &mut self.image, &mut self.out, &updates(zeroes, pages.into_vec()))?;
        self.image.opened.regions.both = true;
        self.image.opened.metadata.size = growth.size;
        self.image.changed();
        self.lookup.forget();
        Ok(())
    }

    /// Of a disk that ends within its last block, what lies behind the end was nobody's.
    fn zero_behind_the_end(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let layout = self.image.layout;
        let block = layout.blocks().saturating_sub(1);
        let within = layout.visible(block);
        let entry = self.lookup.entry(io, &self.image, block, block + 1)?;
        if let (crate::image::Place::Whole(place), true) =
            (self.image.block_place(block, entry)?, within < layout.block_size)
        {
            // It may be cut short in the file.
            let end = place.saturating_add(layout.block_size);
            if self.image.real_length < end {
                self.out.set_length(io, end)?;
                self.image.real_length = end;
                self.image.opened.file_length = end;
            }
            self.out.zero(io, place + within, layout.block_size - within)?;
        }
        Ok(())
    }

    /// Copy the table behind the last block, into a region of `length` bytes.
    fn copy_table(&mut self, io: &mut dyn BlockIo, length: u32) -> DriverResult<Region> {
        let old = self.image.opened.bat;
        let region = Region { offset: self.free, length, ..old };
        let end = region.offset.checked_add(length.into()).ok_or_else(|| overflow("the file"))?;
        self.out.set_length(io, end)?;
        (self.free, self.image.real_length, self.image.opened.file_length) = (end, end, end);
        self.out.copy(io, old.offset, region.offset, self.image.layout.entries() * 8)?;
        Ok(region)
    }

    /// Replace what differs of both region tables.
    fn put_region_tables(&self, io: &mut dyn BlockIo, pages: &mut Pages) -> DriverResult<()> {
        let bytes = self.image.opened.regions.encode();
        let page = Image::in_memory(PAGE)?;
        for offset in REGION_TABLE_OFFSETS {
            let mut old = vec![0; REGION_TABLE_BYTES];
            self.image.read(io, offset, &mut old)?;
            for (index, (old, new)) in old.chunks(page).zip(bytes.chunks(page)).enumerate() {
                if old != new {
                    pages.put(io, &self.image, offset + index as u64 * PAGE, new)?;
                }
            }
        }
        Ok(())
    }
}
