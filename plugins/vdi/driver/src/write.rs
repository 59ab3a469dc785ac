//! Writing blocks: data in place and into new slots, and then the map.
//!
//! The order, and what a crash leaves:
//! 1. data. In place it is hidden by the overlay; new blocks lie in slots that no entry names;
//! 2. *flush*; then `cBlocksAllocated`, which counts the new slots. Before it is durable nothing names them, afterwards they
//!    are lost space at worst. The map must not come first: another program would give the same slot out again;
//! 3. *flush*; then the entries of the map. Each is there or not, and names a whole block.
//!
//! Whatever subset of the writes since the last flush is on the disk, every entry names a block that is durable, and
//! `cBlocksAllocated` is higher than all of them.

use crate::image::{block_number, Image};
use crate::map::Map;
use crate::slots;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::table::{Action, Arrival, ClusterData, ClusterParts, ClusterPlace, Held, Slots, ZeroEntries};
use instar_guest_sdk::{overflow, BlockIo, DriverResult, OrderedWriter, ReadBelow};
use instar_vdi_format::Entry;

/// What is done about a block with this entry. One that gave its slot up would leave a gap in the data area, where other
/// programs go by the number of blocks. `below`: something may show through where the image has nothing.
pub fn decide(entry: Entry, arrival: Arrival, below: bool) -> Action<u32> {
    let held = match entry {
        Entry::Free => Held::Nothing,
        Entry::Zero => Held::Zero,
        Entry::Slot(slot) => Held::At(slot),
    };
    held.decide(arrival, ZeroEntries::WhereNothingIs, below)
}

/// An image that is written to.
#[derive(Debug)]
pub struct Writer {
    pub image: Image,
    pub map: Map,
    pub slots: Slots,
    pub out: OrderedWriter,
    /// The device cannot change its length.
    pub fixed: bool,
    data: ClusterData,
}

impl Writer {
    pub fn new(image: Image, fixed: bool) -> Self {
        let (map, out) = (Map::new(&image, 0), OrderedWriter::new(image.device));
        Self { image, map, slots: Slots::default(), out, fixed, data: ClusterData::default() }
    }

    /// Write what arrives for a block. Its data is submitted by [`Writer::submit`], its entry written by [`Writer::step`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_block(
        &mut self,
        io: &mut dyn BlockIo,
        arriving: &ClusterParts,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (block, disk) = (block_number(arriving.cluster)?, self.image.disk());
        let range = disk.range(arriving.cluster);
        let entry = self.map.get(io, &self.image, block, self.image.header.blocks)?;
        let shows = below.exists() && range.start < below.length();
        let (slot, is_new) = match decide(entry, arriving.arrival(disk), shows) {
            Action::Nothing => return Ok(()),
            Action::InPlace(slot) => (slot, false),
            Action::Allocate => (self.new_slot(io)?, true),
            Action::MarkZero(_) => {
                self.map.set(io, &self.image, block, Entry::Zero)?;
                return self.step_if_full(io);
            }
        };
        let place = ClusterPlace { guest: range, offset: self.image.header.slot_offset(slot), is_new };
        if is_new && shows && entry == Entry::Free {
            self.data.fill_around(io, &mut self.out, &place, &arriving.parts, below)?;
        }
        self.data.write_parts(io, &mut self.out, &place, &arriving.parts)?;
        if is_new {
            self.map.set(io, &self.image, block, Entry::Slot(slot))?;
        }
        self.step_if_full(io)
    }

    /// A slot that nothing uses, whose block reads as zeroes.
    fn new_slot(&mut self, io: &mut dyn BlockIo) -> DriverResult<u32> {
        let slot = slots::take(&mut self.slots, io, &self.image)?;
        if self.image.holds_slot(slot) {
            // A gap, or a block device: what was there before may be anything.
            self.zero_part(slot, 0, self.image.header.block_size);
        }
        Ok(slot)
    }

    /// Have these bytes of a block that has a slot read as zeroes.
    pub fn zero_part(&mut self, slot: u32, start: u64, length: u64) {
        let offset = self.image.header.slot_offset(slot) + start;
        self.data.push(Request::zero(self.image.device, offset, length));
    }

    /// Copy the data of a slot into another one.
    pub fn copy_slot(&mut self, from: u32, to: u32) {
        let (device, length) = (self.image.device, self.image.header.block_size);
        let [from, to] = [from, to].map(|slot| self.image.header.slot_offset(slot));
        self.data.push(Request::copy(device, from, device, to, length));
    }

    fn step_if_full(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.map.is_full() {
            self.step(io)?;
        }
        Ok(())
    }

    /// Submit the data of the blocks so far: what it is read from need not stay where it is any more.
    ///
    /// # Errors
    /// I/O errors.
    pub fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.data.submit(io, &mut self.out)
    }

    /// Steps 2 and 3 for the blocks so far. The entries are not flushed: the next step does that, or [`Writer::finish`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn step(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.submit(io)?;
        if self.map.is_changed() {
            self.lengthen(io)?;
            if u64::from(self.image.header.allocated) < self.slots.top() {
                self.out.barrier(io)?;
                self.count(io)?;
            }
            // This flushes first: the data, or the number that counts it.
            self.map.write(io, &mut self.out)?;
        }
        Ok(())
    }

    /// Write the number of slots that are used or given out, and with it what else of the header has changed.
    ///
    /// # Errors
    /// I/O errors.
    pub fn count(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.image.header.allocated = u32::try_from(self.slots.top()).map_err(|_| overflow("cBlocksAllocated"))?;
        self.image.write_header(io, &mut self.out)
    }

    /// Have the file reach to the end of its last slot: VirtualBox reads no block that does not lie in the file as a whole.
    fn lengthen(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let end = self.image.data_end(self.slots.top()).ok_or_else(|| overflow("the length of the file"))?;
        if !self.fixed && end > self.image.file_length {
            self.out.set_length(io, end)?;
            self.image.file_length = end;
        }
        Ok(())
    }

    /// Make everything durable.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.step(io)?;
        self.out.barrier(io)
    }
}
