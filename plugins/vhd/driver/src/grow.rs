//! Growth of a dynamic disk, in an order that every crash survives:
//!
//! 1. what of the last block lies behind the end of the disk becomes zero, and the table gets entries for the new blocks: behind
//!    the others if there is room for them, or in a copy of it, behind the last block. Nobody refers to any of that yet;
//! 2. the first sector of the dynamic header names the copy. It says the same as the table before;
//! 3. both copies of the footer say the new size. A crash leaves one of them or two different ones, both of which are right; the
//!    one in front counts, and the next run makes them the same.

use crate::batmap::counted_bytes;
use crate::fixed::{grown_size, SAVED_STATE, TOO_LARGE};
use crate::growth::Growth;
use crate::sparse_sink::SparseSink;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{checked_end, overflow, Batch, BlockIo, DriverResult};
use instar_vhd_format::{BATMAP_HEADER_BYTES, FOOTER_BYTES, UNUSED};

/// Bytes of entries that are written at once.
const ENTRY_BYTES: usize = 64 << 10;

impl SparseSink {
    /// See [`Sink::grow`](instar_guest_sdk::Sink::grow).
    pub fn grow(&mut self, io: &mut dyn BlockIo, size: u64) -> DriverResult<()> {
        self.verify(io)?;
        let image = &self.image;
        if image.has_parent() {
            let text =
                "a differencing VHD has to be as large as its parent: let a larger copy of both take their place";
            return Err(self.refused(text));
        }
        if image.footers.footer.has_saved_state() {
            return Err(self.refused(SAVED_STATE));
        }
        let size = grown_size(size).ok_or_else(|| self.refused(TOO_LARGE))?;
        let blocks = u32::try_from(size.div_ceil(image.header.block_size())).ok().filter(|&blocks| blocks < UNUSED);
        let blocks = blocks.ok_or_else(|| self.refused("the disk would have more blocks than a table has entries"))?;
        if self.last_block(io)?.is_some_and(|(_, end)| checked_end(end, 0, self.image.data_end()).is_none()) {
            return Err(
                self.refused("the last block of the disk is cut short in the file: a larger disk would need it whole")
            );
        }
        let room = blocks <= self.image.header.entries() && self.image.batmap.is_none();
        self.growth = Some(Growth { size, moved: (!room).then_some(blocks) });
        Ok(())
    }

    /// Of a disk that ends within its last block, if that is there: byte offsets in the file at which disk and block end.
    fn last_block(&mut self, io: &mut dyn BlockIo) -> DriverResult<Option<(u64, u64)>> {
        let (image, block_size) = (&self.image, self.image.header.block_size());
        let (block, within) = (image.size / block_size, image.size % block_size);
        if within == 0 {
            return Ok(None);
        }
        let entry = self.lookup.entry(io, image, block, block)?;
        let place = image.block_place(block, entry)?;
        Ok(place.map(|place| (place + image.header.bitmap_bytes() + within, place + image.header.stride())))
    }

    /// Grow, if that was agreed to.
    pub fn make_grow(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let Some(growth) = self.growth.take() else { return Ok(()) };
        if let Some((from, to)) = self.last_block(io)? {
            self.out.zero(io, from, to - from)?;
        }
        match growth.moved {
            Some(entries) => self.move_table(io, growth.size, entries)?,
            None => {
                let blocks = growth.size.div_ceil(self.image.header.block_size());
                let old = self.image.blocks();
                self.write_unused(io, self.image.entry_place(old), blocks - old)?;
                self.out.barrier(io)?;
            }
        }
        let footer = self.image.footers.footer.with_size(growth.size);
        self.out.write(io, 0, &footer.encode())?;
        self.image.footers.footer = footer;
        if let Some((offset, _)) = self.image.footers.tail {
            self.out.write(io, offset, &footer.encode())?;
        }
        self.image.size = growth.size;
        self.lookup.forget();
        Ok(())
    }

    /// Write `count` entries of blocks that are not there.
    fn write_unused(&mut self, io: &mut dyn BlockIo, mut place: u64, count: u64) -> DriverResult<()> {
        let bytes = vec![0xff_u8; ENTRY_BYTES];
        let mut left = count.checked_mul(4).ok_or_else(|| overflow("the block allocation table"))?;
        while left > 0 {
            let length = left.min(ENTRY_BYTES as u64);
            self.out.run(io, &mut [Request::write(self.image.device, place, bytes.as_ptr() as u64, length)])?;
            (place, left) = (place + length, left - length);
        }
        Ok(())
    }

    /// Steps 1 and 2 with a copy of the table.
    fn move_table(&mut self, io: &mut dyn BlockIo, size: u64, entries: u32) -> DriverResult<()> {
        let (device, place) = (self.image.device, self.free);
        let header = self.image.header.with_table(place, entries);
        let mut batch = Batch::new();
        self.cut().into_iter().for_each(|request| batch.push(request));
        let old = self.image.blocks();
        batch.push(Request::copy(device, self.image.header.table_offset(), device, place, old * 4));
        batch.submit_to(io, &mut self.out)?;
        // With what pads the table to whole sectors.
        self.write_unused(io, place + old * 4, header.table_bytes() / 4 - old)?;
        self.free = place + header.table_bytes();
        if let Some(batmap) = &mut self.image.batmap {
            let bytes = counted_bytes(size, header.block_size());
            batmap.moved(self.free, bytes)?;
            batmap.write(io, &mut self.out)?;
            self.free += BATMAP_HEADER_BYTES as u64 + bytes;
        }
        if !self.image.fixed_length {
            self.out.write(io, self.free, &self.image.footers.footer.encode())?;
            self.image.footers.tail = Some((self.free, true));
            self.image.file_length = self.free + FOOTER_BYTES as u64;
        }
        self.out.barrier(io)?;
        let first: Vec<u8> = header.encode().into_iter().take(512).collect();
        self.out.write(io, self.image.footers.footer.data_offset(), &first)?;
        self.out.barrier(io)?;
        self.image.header = header;
        self.image.take_metadata();
        Ok(())
    }
}
