//! Emptying a differencing disk, in an order that every crash survives:
//!
//! 1. all entries become unused, and that durable. A crash within leaves some blocks, which read the same from the parent;
//! 2. the batmap is cleared: no entry names a block that it speaks of, so a crash that leaves map and checksum
//!    different, or the old map, does no harm: a program that allocates a block sets its bits again;
//! 3. the footer is written behind the metadata, where nothing is used any more, and that made durable;
//! 4. the file is cut behind it. Until then the footer at the old end is still there; the copy in front never changes.

use crate::image::Image;
use crate::table::Table;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, OrderedWriter};
use instar_vhd_format::{FOOTER_BYTES, SECTOR, UNUSED};

/// Entries of the table that are gone through at once.
const ENTRIES: u64 = 1 << 14;

impl Image {
    /// See [`Source::empty`](instar_guest_sdk::Source::empty).
    pub fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let mut out = OrderedWriter::new(self.device);
        if !self.footers.head {
            // The footer at the end is about to be moved: this is durable with the first step.
            out.write(io, 0, &self.footers.footer.encode())?;
            self.footers.head = true;
        }
        let dropped = self.drop_entries(io, &mut out)?;
        out.barrier(io)?;
        if let Some(batmap) = &mut self.batmap {
            if !batmap.blank || !batmap.valid {
                batmap.clear();
                batmap.write(io, &mut out)?;
            }
        }
        let end = self.metadata_end()?;
        if self.fixed_length {
            self.give_back(io, &mut out, self.data_end())?;
        } else {
            self.cut(io, &mut out, end)?;
            self.give_back(io, &mut out, end)?;
        }
        out.barrier(io)?;
        Ok(dropped)
    }

    /// Step 1.
    fn drop_entries(&self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<u64> {
        let mut dropped = 0;
        Table::each(io, self, ENTRIES, &mut |io, table| {
            let held: Vec<u64> = table.iter().filter(|(_, entry)| *entry != UNUSED).map(|(block, _)| block).collect();
            let (Some(first), Some(last)) = (held.first(), held.last()) else { return Ok(()) };
            dropped += held.len() as u64;
            let entries = usize::try_from(last - first + 1).map_err(|_| overflow("the block allocation table"))?;
            out.write(io, self.entry_place(*first), &vec![0xff; entries * 4])
        })?;
        Ok(dropped)
    }

    /// Steps 3 and 4: the file ends with a footer at byte `end`.
    pub fn cut(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter, end: u64) -> DriverResult<()> {
        let length = end.checked_add(FOOTER_BYTES as u64).ok_or_else(|| overflow("the length of the file"))?;
        if self.footers.tail == Some((end, true)) && self.file_length == length {
            return Ok(());
        }
        let footer = self.footers.footer.encode();
        out.write(io, end, &footer)?;
        out.barrier(io)?;
        out.set_length(io, length)?;
        self.footers.tail = Some((end, true));
        self.file_length = length;
        Ok(())
    }

    /// Give the space between metadata back, up to byte `end`: a table may have been moved behind blocks.
    fn give_back(&self, io: &mut dyn BlockIo, out: &mut OrderedWriter, end: u64) -> DriverResult<()> {
        let mut batch = Batch::new();
        let mut at = 0;
        let mut gaps = Vec::new();
        for (range, _) in self.metadata() {
            gaps.push(at..range.start.min(end));
            at = range.end.next_multiple_of(SECTOR).max(at);
        }
        gaps.push(at..end);
        for gap in gaps.into_iter().filter(|gap| gap.start < gap.end) {
            batch.push(Request::discard(self.device, gap.start, gap.end - gap.start));
        }
        batch.submit_to(io, out)
    }
}
