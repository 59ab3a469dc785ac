//! Making room for a longer map, where the first blocks lie.
//!
//! VirtualBox (`vdiResize`) moves these blocks to the end of the file and counts all slots from a later begin of the data
//! area. It changes the whole map in place for that: a crash in between leaves an image of which nobody knows how far it
//! was. Here the longer map is another one, and the header's switch to it is one write within a sector:
//!
//! 1. copies of the first blocks at the end, which no entry names;
//! 2. *flush*, `cBlocksAllocated`, *flush*, and the entries of these blocks, as for any new block. A crash leaves them in
//!    either place, and lost space at worst. On a disk that is full, `cBlocksAllocated` is higher than the number of blocks for
//!    that long, which VirtualBox refuses: run the commit again;
//! 3. *flush*; then the new map, over the first blocks, which nothing names any more;
//! 4. *flush*; then the header: where map and data begin, how many entries and slots there are, and the size of the disk.

use crate::growth::{Growth, Relocation};
use crate::map::{bytes_of, each_chunk, each_entry};
use crate::slots;
use crate::survey::verified;
use crate::write::Writer;
use alloc::vec::Vec;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vdi_format::{Entry, ENTRY_BYTES};

/// Make room, and give the image its new size. Everything before is durable.
///
/// # Errors
/// I/O errors.
pub fn relocate(
    io: &mut dyn BlockIo,
    writer: &mut Writer,
    relocation: Relocation,
    growth: &Growth,
    first_new: u32,
) -> DriverResult<()> {
    move_blocks(io, writer, relocation.slots)?;
    writer.finish(io)?;
    let map = writer.image.header.data_offset;
    write_map(io, writer, relocation.slots, map, first_new)?;
    let block_size = writer.image.header.block_size;
    growth.write_entries(io, &mut writer.out, map, first_new..growth.blocks, block_size)?;
    if !writer.fixed && writer.image.file_length < relocation.data_offset {
        writer.out.set_length(io, relocation.data_offset)?;
        writer.image.file_length = relocation.data_offset;
    }
    writer.out.barrier(io)?;
    let allocated = writer.slots.top().saturating_sub(relocation.slots.into());
    let header = &mut writer.image.header;
    (header.map_offset, header.data_offset) = (map, relocation.data_offset);
    (header.disk_size, header.blocks) = (growth.disk_size, growth.blocks);
    header.allocated = u32::try_from(allocated).map_err(|_| overflow("cBlocksAllocated"))?;
    writer.image.write_header(io, &mut writer.out)?;
    writer.map.forget();
    writer.slots = slots::left_by(&verified(io, &writer.image)?);
    Ok(())
}

/// Give the blocks in the first slots others, behind all slots in use.
fn move_blocks(io: &mut dyn BlockIo, writer: &mut Writer, slots: u32) -> DriverResult<()> {
    let mut moved: Vec<(u32, u32)> = Vec::new();
    each_entry(io, &writer.image, 0..writer.image.header.blocks, &mut |block, entry| {
        moved.extend(entry.slot().filter(|&slot| slot < slots).map(|slot| (block, slot)));
        Ok(())
    })?;
    if moved.is_empty() {
        return Ok(());
    }
    writer.slots.skip_to(slots.into());
    for (block, from) in moved {
        let to = slots::append(&mut writer.slots, &writer.image)?;
        writer.copy_slot(from, to);
        writer.map.set(io, &writer.image, block, Entry::Slot(to))?;
        if writer.map.is_full() {
            writer.step(io)?;
        }
    }
    Ok(())
}

/// Write the entries of the blocks that the disk has by now, counted from the later begin, into the new map.
fn write_map(io: &mut dyn BlockIo, writer: &mut Writer, slots: u32, map: u64, blocks: u32) -> DriverResult<()> {
    let Writer { image, out, .. } = writer;
    each_chunk(io, image, 0..blocks, &mut |io, first, entries| {
        let shifted = |&entry: &u32| match Entry::decode(entry) {
            Entry::Slot(slot) => Ok(slot.checked_sub(slots).ok_or_else(|| overflow("a slot"))?),
            other => Ok(other.encode()),
        };
        let entries = entries.iter().map(shifted).collect::<DriverResult<Vec<u32>>>()?;
        let at = (u64::from(first) * ENTRY_BYTES).checked_add(map).ok_or_else(|| overflow("the map"))?;
        out.write(io, at, &bytes_of(&entries))
    })
}
