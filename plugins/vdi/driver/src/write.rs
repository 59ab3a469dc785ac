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

use crate::decide::{decide, Action, Arrival};
use crate::image::{Image, Shape};
use crate::map::Map;
use crate::slots::Slots;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, Extent, OrderedWriter, ReadBelow};
use instar_vdi_format::Entry;

/// Requests that are collected before they are submitted.
const BATCH: usize = 4096;
/// Bytes from below that are collected before they are written, and that are read at once.
const FILL_BYTES: usize = 4 << 20;
const FILL_CHUNK: u64 = 1 << 20;

/// What arrives for one block: parts of extents, ascending.
#[derive(Debug, Default)]
pub struct BlockParts {
    pub block: u32,
    pub parts: Vec<Extent>,
}

impl BlockParts {
    /// What arrives at a disk, taken together.
    pub fn arrival(&self, disk: Shape) -> Arrival {
        let range = disk.block_range(self.block);
        let covered: u64 = self.parts.iter().map(|part| part.length).sum();
        Arrival { zero: self.parts.iter().all(Extent::is_zero), whole: covered >= range.end - range.start }
    }

    /// Hand the blocks that extents touch to `each`, in their order, each with all that the extents have of it.
    ///
    /// # Errors
    /// Those of `each`; `BackingTooSmall` for an extent past the end of the disk.
    pub fn each(disk: Shape, extents: &[Extent], each: &mut dyn FnMut(&Self) -> DriverResult<()>) -> DriverResult<()> {
        let mut gathered = Self::default();
        for extent in extents {
            extent.end_within(disk.size)?;
            for part in extent.blocks(disk.block)? {
                let block = u32::try_from(part.guest_offset / disk.block).map_err(|_| overflow("a block"))?;
                if block != gathered.block && !gathered.parts.is_empty() {
                    each(&gathered)?;
                    gathered.parts.clear();
                }
                gathered.block = block;
                gathered.parts.push(part);
            }
        }
        if gathered.parts.is_empty() {
            return Ok(());
        }
        each(&gathered)
    }
}

/// Requests that were not submitted yet, and the bytes that they write.
#[derive(Debug, Default)]
struct Pending {
    requests: Batch,
    buffers: Vec<Vec<u8>>,
    bytes: usize,
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
    pending: Pending,
}

impl Writer {
    pub fn new(image: Image, map: Map, slots: Slots, fixed: bool) -> Self {
        let out = OrderedWriter::new(image.device);
        Self { image, map, slots, out, fixed, pending: Pending::default() }
    }

    /// Write what arrives for a block. Its data is submitted by [`Writer::submit`], its entry written by [`Writer::step`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_block(
        &mut self,
        io: &mut dyn BlockIo,
        arriving: &BlockParts,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let BlockParts { block, parts } = arriving;
        let disk = self.image.disk();
        let range = disk.block_range(*block);
        let entry = self.map.get(io, &self.image, *block, self.image.header.blocks)?;
        let shows = below.exists() && range.start < below.length();
        match decide(entry, arriving.arrival(disk), shows) {
            Action::Nothing => {}
            Action::InPlace(slot) => self.write_parts(io, slot, range.start, parts)?,
            Action::MarkZero => self.map.set(io, &self.image, *block, Entry::Zero)?,
            Action::Allocate => {
                let slot = self.slots.take(io, &self.image)?;
                let offset = self.image.header.slot_offset(slot);
                if self.image.holds_slot(slot) {
                    // A gap, or a block device: what was there before may be anything.
                    self.pending.requests.push(Request::zero(self.image.device, offset, self.image.header.block_size));
                }
                if shows && entry == Entry::Free {
                    let mut at = range.start;
                    let end = Extent::zero(range.end, 0);
                    for part in parts.iter().chain([&end]) {
                        self.fill(io, (at, part.guest_offset), offset + (at - range.start), below)?;
                        at = part.end();
                    }
                }
                self.write_parts(io, slot, range.start, parts)?;
                self.map.set(io, &self.image, *block, Entry::Slot(slot))?;
            }
        }
        if self.map.is_full() {
            self.step(io)?;
        }
        Ok(())
    }

    fn write_parts(&mut self, io: &mut dyn BlockIo, slot: u32, start: u64, parts: &[Extent]) -> DriverResult<()> {
        let offset = self.image.header.slot_offset(slot);
        for part in parts {
            // What lies behind the end of the file is zero already.
            if !part.is_zero() || self.image.holds_slot(slot) {
                self.pending.requests.push(part.request(self.image.device, offset + (part.guest_offset - start))?);
            }
            self.submit_if_full(io)?;
        }
        Ok(())
    }

    /// Write what shows from below at guest bytes `from..to` to byte `offset` of the file, which reads as zeroes.
    fn fill(
        &mut self,
        io: &mut dyn BlockIo,
        (from, to): (u64, u64),
        offset: u64,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let mut at = from;
        let end = to.min(below.length());
        while at < end {
            let length = FILL_CHUNK.min(end - at);
            let mut buffer = vec![0; usize::try_from(length).map_err(|_| overflow("a block"))?];
            below.read(io, at, &mut buffer)?;
            if buffer.iter().any(|&byte| byte != 0) {
                let address = buffer.as_ptr() as u64;
                self.pending.requests.push(Request::write(self.image.device, offset + (at - from), address, length));
                self.pending.bytes += buffer.len();
                self.pending.buffers.push(buffer);
            }
            self.submit_if_full(io)?;
            at += length;
        }
        Ok(())
    }

    /// Have these bytes of a block that has a slot read as zeroes.
    pub fn zero_part(&mut self, slot: u32, start: u64, length: u64) {
        let offset = self.image.header.slot_offset(slot) + start;
        self.pending.requests.push(Request::zero(self.image.device, offset, length));
    }

    /// Copy the data of a slot into another one.
    pub fn copy_slot(&mut self, from: u32, to: u32) {
        let (device, length) = (self.image.device, self.image.header.block_size);
        let [from, to] = [from, to].map(|slot| self.image.header.slot_offset(slot));
        self.pending.requests.push(Request::copy(device, from, device, to, length));
    }

    fn submit_if_full(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.pending.requests.len() >= BATCH || self.pending.bytes >= FILL_BYTES {
            self.submit(io)?;
        }
        Ok(())
    }

    /// Submit the data of the blocks so far: what it is read from need not stay where it is any more.
    ///
    /// # Errors
    /// I/O errors.
    pub fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.pending.requests.submit_to(io, &mut self.out)?;
        self.pending = Pending::default();
        Ok(())
    }

    /// Steps 2 and 3 for the blocks so far. The entries are not flushed: the next step does that, or [`Writer::finish`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn step(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.submit(io)?;
        if !self.map.is_changed() {
            return Ok(());
        }
        self.lengthen(io)?;
        self.out.barrier(io)?;
        if u64::from(self.image.header.allocated) < self.slots.top() {
            self.count(io)?;
            self.out.barrier(io)?;
        }
        self.map.write(io, &self.image, &mut self.out)
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
