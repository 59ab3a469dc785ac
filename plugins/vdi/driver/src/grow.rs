//! Growing an image: more entries in the map, and then the size in the header.
//!
//! The order, and what a crash leaves:
//! 1. what the last block holds past the old end becomes zeroes, and where an image below would show there, the block gets a
//!    slot of its own. This is past the end of the disk, or what was seen anyway;
//! 2. *flush*; where the map has no room, [room is made](crate::relocate) for a longer one;
//! 3. the entries of the new blocks, behind those that count;
//! 4. *flush*; then the size and the number of entries, in one write within a sector. It is durable before any data arrives:
//!    that is preceded by the new `uuidModify`, and a flush of it.

use crate::growth::Growth;
use crate::relocate::relocate;
use crate::write::Writer;
use alloc::vec::Vec;
use instar_guest_sdk::table::ClusterParts;
use instar_guest_sdk::{BlockIo, DriverResult, ReadBelow};
use instar_vdi_format::Entry;

impl Growth {
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
}
