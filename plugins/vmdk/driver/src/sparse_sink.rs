//! Writing into a sparse extent: data goes into grains that are there, and into new ones at the end of the file.
//!
//! The order of writing, for each group of extents, and what a crash leaves:
//! 1. data, and the file's new length. In place the data is hidden by the overlay; new grains, and the room for new tables, are
//!    beyond what any table or directory names;
//! 2. in an extent of ESX, *flush*; then the number of the first free sector: ESX puts its next grain there, so it is behind all
//!    that is about to be named before anything names it, and never behind the end of the file. A crash loses space;
//! 3. *flush*; then the grain tables: their entries name only what is durable. New tables are not named by the directory yet.
//!    With that *flushed*, the second copies, so that a crash leaves these out of date and never the first ones, which count;
//! 4. *flush*; then the entries of the directories for new tables;
//! 5. grains whose entries say zeroes now are given back: where the entry is not durable yet, they read as zeroes, too,
//!    and the overlay hides them.
//!
//! Whatever subset of the writes since the last flush is on the disk, every entry names a whole grain or table.

use crate::growth::SparseGrowth;
use crate::image::Image;
use crate::sparse_plan::Planner;
use crate::tables::Table;
use crate::work::{grains, GrainPart, Group, Groups, OpenGrain};
use alloc::vec::Vec;
use instar_guest_sdk::abi::{device_flags, FileDevice, PlanSummary, Request};
use instar_guest_sdk::table::{Action, ClusterData, ClusterPlace};
use instar_guest_sdk::{overflow, BlockIo, DriverResult, Extent, OrderedWriter, ReadBelow};
use instar_vmdk_format::{table_marker, Compressor, CowdHeader, Grain, SECTOR};

/// Grains whose space is given back in one batch.
const BATCH: usize = 4096;
/// The first and the last entry that a directory gets, if it gets any.
type Named = Option<(usize, usize)>;

/// A sparse extent that data goes into.
#[derive(Debug)]
pub struct SparseSink {
    pub(crate) image: Image,
    pub(crate) planner: Planner,
    /// Where the next grain goes, at a multiple of [`Layout::alignment`](instar_vmdk_format::Layout::alignment).
    pub(crate) space: Space,
    pub(crate) out: OrderedWriter,
    /// The compressed grain that is gathered: more may arrive for it with the next call.
    pub(crate) open: Option<OpenGrain>,
    pub(crate) compressor: Compressor,
    /// How it will grow, if it does.
    pub(crate) growth: Option<SparseGrowth>,
}

/// The space behind all that is in use: its first byte.
#[derive(Debug)]
pub struct Space(pub(crate) u64);

impl Space {
    /// Take `bytes` bytes, from the returned sector on.
    ///
    /// # Errors
    /// Behind the last sector that an entry can name. The plan has seen to it that there is none.
    pub fn take(&mut self, bytes: u64) -> DriverResult<u32> {
        let sector = u32::try_from(self.0 / SECTOR).map_err(|_| overflow("a place in the file"))?;
        self.0 = self.0.checked_add(bytes).ok_or_else(|| overflow("the length of the file"))?;
        Ok(sector)
    }

    /// Skip to the next multiple of `bytes`.
    pub fn align(&mut self, bytes: u64) -> DriverResult<()> {
        self.0 = self.0.checked_next_multiple_of(bytes).ok_or_else(|| overflow("the length of the file"))?;
        Ok(())
    }
}

/// What is on its way into the file.
#[derive(Default)]
pub struct Pending {
    pub data: ClusterData,
    /// Places of grains that are not needed any more once the entries are written.
    freed: Vec<u64>,
}

impl SparseSink {
    pub(crate) fn new(image: Image, file: &FileDevice, has_backing: bool) -> DriverResult<Self> {
        let planner = Planner::of(&image, file, has_backing)?;
        let (space, out) = (Space(planner.first_free), OrderedWriter::new(image.device));
        let compressor = Compressor::new(file.flags & device_flags::COMPRESS != 0);
        Ok(Self { image, planner, space, out, open: None, compressor, growth: None })
    }

    pub(crate) fn write_group(
        &mut self,
        io: &mut dyn BlockIo,
        group: &Group,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let mut tables = self.image.read_both(io, &group.tables)?;
        let mut pending = Pending::default();
        for piece in &group.pieces {
            for part in grains(&self.image, piece)? {
                self.write_part(io, (&mut tables, piece.slot), &part, below, &mut pending)?;
            }
        }
        self.publish(io, &tables, pending)
    }

    /// Write what is pending, and then, in order, what refers to it.
    pub(crate) fn publish(&mut self, io: &mut dyn BlockIo, tables: &[Table], mut pending: Pending) -> DriverResult<()> {
        let named = self.place_tables(tables, &mut pending)?;
        pending.data.submit(io, &mut self.out)?;
        // Whether or not the group has changed anything.
        self.out.written();
        self.lengthen(io)?;
        self.write_tables(io, tables, named)?;
        let size = self.image.layout.grain_bytes();
        let discard = |&offset: &u64| Request::discard(self.image.device, offset, size);
        let mut run = |some: &[u64]| self.out.run(io, &mut some.iter().map(discard).collect::<Vec<_>>());
        pending.freed.chunks(BATCH).try_for_each(&mut run)
    }

    /// Have the file reach to the end of its last grain or table, and the header of an extent of ESX say that.
    fn lengthen(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let end = if self.space.0 == self.planner.first_free {
            // Nothing is new. But what QEMU has added may not be in front of the first free sector.
            match self.planner.stale_end(&self.image) {
                Some(end) => end,
                None => return Ok(()),
            }
        } else {
            self.space.0
        };
        let length = self.image.layout.file_length(end).ok_or_else(|| overflow("the length of the file"))?;
        if length > self.image.file_length {
            self.out.set_length(io, length)?;
            self.image.file_length = length;
        }
        let sector = end / SECTOR;
        if self.image.layout.next_free.is_some_and(|free| free < sector) {
            self.out.barrier(io)?;
            let number = u32::try_from(sector).map_err(|_| overflow("the first free sector"))?;
            let (place, bytes) = CowdHeader::free_sector(number);
            self.out.write(io, place.start as u64, &bytes)?;
            self.image.layout.next_free = Some(sector);
        }
        Ok(())
    }

    /// Take what arrives for a part of a grain.
    fn write_part(
        &mut self,
        io: &mut dyn BlockIo,
        (tables, slot): (&mut [Table], usize),
        part: &GrainPart,
        below: &mut dyn ReadBelow,
        pending: &mut Pending,
    ) -> DriverResult<()> {
        if self.goes_on(io, tables, part, pending)? {
            return Ok(());
        }
        let table = tables.get_mut(slot).ok_or_else(|| overflow("a table"))?;
        let entry = table.entries.get_mut(part.entry).ok_or_else(|| overflow("an entry"))?;
        let layout = self.image.layout;
        let grain = layout.grain_of(*entry);
        // Over the interface of modules, nobody but a growth says where that ends.
        let shows = below.exists() && part.grain < below.length().min(self.planner.below_end);
        let (offset, is_new) = match self.image.decide(grain, part.arrival, shows) {
            Action::Nothing => return Ok(()),
            // The plan has seen that, too: nothing may be lost if something else has changed the file since.
            Action::InPlace(offset) if layout.compressed => return self.planner.holds(io, &self.image, offset, part),
            Action::InPlace(offset) => (offset, false),
            Action::MarkZero(old) => {
                *entry = 1;
                table.dirty = true;
                // How much room a compressed grain has is not known here.
                pending.freed.extend(old.filter(|_| !layout.compressed));
                return Ok(());
            }
            Action::Allocate if layout.compressed => {
                let below = Some(below).filter(|_| shows && grain == Grain::Absent);
                return self.gather(io, tables, part, below, pending);
            }
            Action::Allocate => {
                *entry = self.space.take(layout.grain_bytes())?;
                table.dirty = true;
                (u64::from(*entry) * SECTOR, true)
            }
        };
        // A new grain lies behind the end of the file, where everything is zero already.
        let place = ClusterPlace { guest: part.grain..part.grain + part.length, offset, is_new };
        let parts = core::slice::from_ref(&part.extent);
        if is_new && shows && grain == Grain::Absent {
            pending.data.fill_around(io, &mut self.out, &place, parts, below)?;
        }
        pending.data.write_parts(io, &mut self.out, &place, parts)
    }

    /// Find places for tables that changed and that are not there, in both copies. Returns the first and the last entry that
    /// each directory gets; only memory has them yet.
    fn place_tables(&mut self, tables: &[Table], pending: &mut Pending) -> DriverResult<[Named; 2]> {
        let (device, layout) = (self.image.device, self.image.layout);
        let mut all: [Named; 2] = [None, None];
        for table in tables.iter().filter(|table| table.dirty) {
            for (directory, named) in self.image.directories_mut().zip(&mut all) {
                let sector = directory.entries.get_mut(table.index).ok_or_else(|| overflow("a table"))?;
                if *sector != 0 {
                    continue;
                }
                if layout.table_marker_bytes() > 0 {
                    let marker = self.space.take(layout.table_marker_bytes())?;
                    pending.data.push_bytes(device, u64::from(marker) * SECTOR, table_marker().to_vec());
                }
                *sector = self.space.take(layout.table_bytes())?;
                *named = Some((named.map_or(table.index, |(first, _)| first), table.index));
            }
        }
        self.space.align(layout.alignment())?;
        Ok(all)
    }

    /// The tables that changed, in both copies, then the directories.
    fn write_tables(&mut self, io: &mut dyn BlockIo, tables: &[Table], named: [Named; 2]) -> DriverResult<()> {
        if !tables.iter().any(|table| table.dirty) {
            return Ok(());
        }
        let (device, size) = (self.image.device, self.image.layout.table_bytes());
        let mut requests = Vec::new();
        let dirty = || tables.iter().filter(|table| table.dirty);
        let bytes = |table: &Table| table.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let buffers: Vec<Vec<u8>> = dirty().map(bytes).collect();
        for directory in self.image.directories() {
            requests.push(Request::flush(device));
            for (table, bytes) in dirty().zip(&buffers) {
                let sector = *directory.entries.get(table.index).ok_or_else(|| overflow("a table"))?;
                requests.push(Request::write(device, u64::from(sector) * SECTOR, bytes.as_ptr() as u64, size));
            }
        }
        self.out.run(io, &mut requests)?;
        drop(buffers);
        if named.iter().all(Option::is_none) {
            return Ok(());
        }
        self.out.barrier(io)?;
        for (named, directory) in named.into_iter().zip(self.image.directories()) {
            let Some((first, last)) = named else { continue };
            let entries = directory.entries.get(first..=last).unwrap_or_default();
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            self.out.write(io, directory.sector * SECTOR + first as u64 * 4, &bytes)?;
        }
        Ok(())
    }
}

impl SparseSink {
    /// See [`Sink::plan`](instar_guest_sdk::Sink::plan).
    pub fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.planner.plan(io, &self.image, extents)
    }

    /// See [`Sink::planned`](instar_guest_sdk::Sink::planned).
    pub fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.planner.planned(io, &self.image)
    }

    /// See [`Sink::write`](instar_guest_sdk::Sink::write).
    pub fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if self.image.footer && self.planner.appends() {
            self.leave_stream(io)?;
        }
        let mut groups = Groups::of(extents);
        while let Some(group) = groups.next(&self.image)? {
            self.close_before(io, &group)?;
            self.write_group(io, &group, below)?;
        }
        Ok(())
    }

    /// See [`Sink::finish`](instar_guest_sdk::Sink::finish).
    pub fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.close_before(io, &Group::default())?;
        self.out.barrier(io)
    }
}
