//! Writing into a sparse extent: data goes into grains that are there, and into new ones at the end of the file.
//!
//! The order of writing, for each group of extents, and what a crash leaves:
//! 1. data. In place it is hidden by the overlay; new grains are beyond what any table names;
//! 2. *flush*; then the grain tables, both copies: their entries name only what is durable. New tables are not
//!    named by the directory yet;
//! 3. *flush*; then the entries of the directories for new tables;
//! 4. grains whose entries say zeroes now are given back: where the entry is not durable yet, they read as zeroes, too,
//!    and the overlay hides them.
//!
//! Whatever subset of the writes since the last flush is on the disk, every entry names a whole grain or table.

use crate::decide::{decide, Action};
use crate::image::Image;
use crate::tables::Table;
use crate::work::{grains, Group, Groups, Part};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{device_flags, ErrorCode, FileDevice, PlanSummary, Request};
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverError, DriverResult, Extent, OrderedWriter, ReadBelow};
use instar_vmdk_format::{Grain, SECTOR, TABLE_BYTES};

/// Requests that are collected before they are submitted.
const BATCH: usize = 4096;
/// Bytes from below that are collected before they are written.
const FILL_BYTES: usize = 4 << 20;
/// Bytes that are read from below at once.
const FILL_CHUNK: u64 = 1 << 20;
/// An entry that stands for a grain which is yet to get its place, while planning.
const PLANNED: u32 = u32::MAX;

/// What planning counted.
#[derive(Debug, Default)]
struct Planned {
    verified: bool,
    grains: u64,
    /// Copies of tables that are missing.
    copies: u64,
    /// Tables of which a copy is missing.
    tables: u64,
    /// The first guest byte of the last grain that was counted, and the last table.
    last_grain: Option<u64>,
    last_table: Option<usize>,
}

/// A sparse extent that data goes into.
#[derive(Debug)]
pub struct SparseSink {
    image: Image,
    max_length: u64,
    /// The device cannot change its length.
    fixed: bool,
    has_backing: bool,
    /// Where the next grain goes, a multiple of its size.
    next_free: u64,
    planned: Planned,
    out: OrderedWriter,
}

/// Requests that were not submitted yet, and the bytes that they write.
#[derive(Default)]
struct Pending {
    requests: Batch,
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

impl Pending {
    fn is_full(&self) -> bool {
        self.requests.len() >= BATCH || self.bytes >= FILL_BYTES
    }

    fn submit(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        self.requests.submit_to(io, out)?;
        *self = Self::default();
        Ok(())
    }
}

impl SparseSink {
    pub(crate) fn new(image: Image, file: &FileDevice, has_backing: bool) -> DriverResult<Self> {
        if image.compressed() {
            let text = "compressed grains (streamOptimized) cannot be committed into";
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 8));
        }
        let next_free = image.file_length.checked_next_multiple_of(image.header.grain_bytes());
        let next_free = next_free.ok_or_else(|| overflow("the length of the file"))?;
        let FileDevice { max_length, flags, .. } = *file;
        let fixed = flags & device_flags::FIXED_LENGTH != 0;
        let (out, planned) = (OrderedWriter::new(image.device), Planned::default());
        Ok(Self { image, max_length, fixed, has_backing, next_free, planned, out })
    }

    fn verify(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if !self.planned.verified {
            self.image.verify(io)?;
            self.planned.verified = true;
        }
        Ok(())
    }

    fn plan_group(&mut self, io: &mut dyn BlockIo, group: &Group) -> DriverResult<()> {
        let mut tables = self.image.read_both(io, &group.tables)?;
        let Self { image, planned, has_backing, .. } = self;
        for piece in &group.pieces {
            let table = tables.get_mut(piece.slot).ok_or_else(|| overflow("a table"))?;
            for part in grains(image, piece)? {
                let slot = table.entries.get_mut(part.entry).ok_or_else(|| overflow("an entry"))?;
                // A grain that two calls have a part in is counted once.
                if planned.last_grain == Some(part.grain) {
                    continue;
                }
                let grain = Grain::decode(*slot, image.zeroed_grains());
                match decide(grain, part.arrival, image.zeroed_grains(), *has_backing) {
                    Action::Nothing | Action::InPlace(_) => continue,
                    Action::Allocate => {
                        planned.grains += 1;
                        *slot = PLANNED;
                    }
                    Action::MarkZero(_) => *slot = 1,
                }
                planned.last_grain = Some(part.grain);
                table.dirty = true;
            }
        }
        for table in tables.iter().filter(|table| table.dirty) {
            if planned.last_table != Some(table.index) {
                planned.last_table = Some(table.index);
                let directories = core::iter::once(&image.directory).chain(&image.redundant);
                let missing = directories.filter(|d| d.get(table.index) == Some(&0)).count() as u64;
                planned.copies += missing;
                planned.tables += u64::from(missing > 0);
            }
        }
        Ok(())
    }

    fn write_group(&mut self, io: &mut dyn BlockIo, group: &Group, below: &mut dyn ReadBelow) -> DriverResult<()> {
        let mut tables = self.image.read_both(io, &group.tables)?;
        let mut pending = Pending::default();
        let mut freed = Vec::new();
        for piece in &group.pieces {
            let table = tables.get_mut(piece.slot).ok_or_else(|| overflow("a table"))?;
            for part in grains(&self.image, piece)? {
                self.write_part(io, table, part, below, &mut pending, &mut freed)?;
                if pending.is_full() {
                    pending.submit(io, &mut self.out)?;
                }
            }
        }
        pending.submit(io, &mut self.out)?;
        // Whether or not the group has changed anything.
        self.out.written();
        self.lengthen(io)?;
        self.write_tables(io, &mut tables)?;
        let size = self.image.header.grain_bytes();
        let discard = |&offset: &u64| Request::discard(self.image.device, offset, size);
        let mut run = |some: &[u64]| self.out.run(io, &mut some.iter().map(discard).collect::<Vec<_>>());
        freed.chunks(BATCH).try_for_each(&mut run)
    }

    /// Have the file reach to the end of its last grain or table.
    fn lengthen(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        // Where it does already, nothing was allocated.
        let begin = self.image.file_length.checked_next_multiple_of(self.image.header.grain_bytes());
        if begin.is_none_or(|begin| self.next_free > begin) {
            self.out.set_length(io, self.next_free)?;
            self.image.file_length = self.next_free;
        }
        Ok(())
    }

    fn write_part(
        &mut self,
        io: &mut dyn BlockIo,
        table: &mut Table,
        part: Part,
        below: &mut dyn ReadBelow,
        pending: &mut Pending,
        freed: &mut Vec<u64>,
    ) -> DriverResult<()> {
        let entry = table.entries.get_mut(part.entry).ok_or_else(|| overflow("an entry"))?;
        let grain = Grain::decode(*entry, self.image.zeroed_grains());
        let shows = below.exists() && part.grain < below.length();
        let start = part.extent.guest_offset - part.grain;
        match decide(grain, part.arrival, self.image.zeroed_grains(), shows) {
            Action::Nothing => {}
            Action::InPlace(offset) => {
                pending.requests.push(part.extent.request(self.image.device, offset + start)?);
            }
            Action::MarkZero(old) => {
                *entry = 1;
                table.dirty = true;
                freed.extend(old);
            }
            Action::Allocate => {
                let offset = self.next_free;
                *entry = u32::try_from(offset / SECTOR).map_err(|_| overflow("the place of a grain"))?;
                table.dirty = true;
                let size = self.image.header.grain_bytes();
                self.next_free = offset.checked_add(size).ok_or_else(|| overflow("the length of the file"))?;
                let end = (part.grain + size).min(self.image.header.virtual_size());
                if shows && grain == Grain::Absent {
                    let (from, to) = (part.extent.guest_offset, part.extent.end());
                    for (from, to) in [(part.grain, from), (to, end)] {
                        self.fill(io, (from, to), offset + (from - part.grain), below, pending)?;
                    }
                }
                // Behind the end of the file everything is zero already.
                if !part.arrival.zero {
                    pending.requests.push(part.extent.request(self.image.device, offset + start)?);
                }
            }
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
        pending: &mut Pending,
    ) -> DriverResult<()> {
        let mut at = from;
        while at < to {
            let length = FILL_CHUNK.min(to - at);
            let mut buffer = vec![0; usize::try_from(length).map_err(|_| overflow("a grain"))?];
            below.read(io, at, &mut buffer)?;
            if buffer.iter().any(|&b| b != 0) {
                let address = buffer.as_ptr() as u64;
                pending.requests.push(Request::write(self.image.device, offset + (at - from), address, length));
                pending.bytes += buffer.len();
                pending.buffers.push(buffer);
            }
            if pending.is_full() {
                pending.submit(io, &mut self.out)?;
            }
            at += length;
        }
        Ok(())
    }

    /// Steps 2 and 3: the tables that changed, in both copies, then the directories.
    fn write_tables(&mut self, io: &mut dyn BlockIo, tables: &mut [Table]) -> DriverResult<()> {
        if !tables.iter().any(|table| table.dirty) {
            return Ok(());
        }
        let device = self.image.device;
        let mut requests = vec![Request::flush(device)];
        let mut buffers: Vec<Vec<u8>> = Vec::new();
        // The first and the last entry that each directory gets.
        let mut named: [Option<(usize, usize)>; 2] = [None, None];
        for table in tables.iter().filter(|table| table.dirty) {
            let bytes: Vec<u8> = table.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            for (copy, named) in named.iter_mut().enumerate() {
                let directory = match copy {
                    0 => &mut self.image.directory,
                    _ => match &mut self.image.redundant {
                        Some(redundant) => redundant,
                        None => continue,
                    },
                };
                let sector = directory.get_mut(table.index).ok_or_else(|| overflow("a table"))?;
                if *sector == 0 {
                    *sector = u32::try_from(self.next_free / SECTOR).map_err(|_| overflow("the place of a table"))?;
                    self.next_free += TABLE_BYTES;
                    *named = Some((named.map_or(table.index, |(first, _)| first), table.index));
                }
                let offset = u64::from(*sector) * SECTOR;
                requests.push(Request::write(device, offset, bytes.as_ptr() as u64, TABLE_BYTES));
            }
            buffers.push(bytes);
        }
        self.out.run(io, &mut requests)?;
        drop(buffers);
        let size = self.image.header.grain_bytes();
        self.next_free =
            self.next_free.checked_next_multiple_of(size).ok_or_else(|| overflow("the length of the file"))?;
        if named.iter().all(Option::is_none) {
            return Ok(());
        }
        self.lengthen(io)?;
        self.out.barrier(io)?;
        let header = &self.image.header;
        let places = [
            (header.directory, Some(&self.image.directory)),
            (header.redundant_directory, self.image.redundant.as_ref()),
        ];
        for (named, (sector, directory)) in named.into_iter().zip(places) {
            let (Some((first, last)), Some(directory)) = (named, directory) else { continue };
            let entries = directory.get(first..=last).unwrap_or_default();
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            self.out.write(io, sector * SECTOR + first as u64 * 4, &bytes)?;
        }
        Ok(())
    }
}

impl SparseSink {
    /// See [`Sink::plan`](instar_guest_sdk::Sink::plan).
    pub fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.verify(io)?;
        let mut groups = Groups::of(extents);
        while let Some(group) = groups.next(&self.image)? {
            self.plan_group(io, &group)?;
        }
        Ok(())
    }

    /// See [`Sink::planned`](instar_guest_sdk::Sink::planned).
    pub fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.verify(io)?;
        let Planned { grains, copies, tables, .. } = self.planned;
        // Each new table may make the next grain begin at another multiple of its size.
        let size = self.image.header.grain_bytes();
        let new = grains.checked_add(tables).and_then(|count| count.checked_mul(size));
        let new = new.zip(copies.checked_mul(TABLE_BYTES)).and_then(|(a, b)| a.checked_add(b));
        let length =
            new.and_then(|new| self.next_free.checked_add(new)).ok_or_else(|| overflow("the file's length"))?;
        let final_length = if grains == 0 && copies == 0 { self.image.file_length } else { length };
        let longest = self.max_length.max(self.image.file_length).min(u64::from(u32::MAX) * SECTOR);
        if final_length > self.image.file_length && self.fixed {
            let text =
                "new grains are added behind the end of the file, and a block device has nothing there: copy the \
                        image into a file, or convert it to another format";
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.image.device, 0));
        }
        if final_length > longest {
            let text = format!("the file would become {final_length} bytes long, and cannot be longer than {longest}");
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.image.device, 0));
        }
        let new_metadata_clusters = copies.saturating_mul(TABLE_BYTES).div_ceil(size);
        Ok(PlanSummary { final_length, new_data_clusters: grains, new_metadata_clusters, ..PlanSummary::default() })
    }

    /// See [`Sink::write`](instar_guest_sdk::Sink::write).
    pub fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        let mut groups = Groups::of(extents);
        while let Some(group) = groups.next(&self.image)? {
            self.write_group(io, &group, below)?;
        }
        Ok(())
    }

    /// See [`Sink::finish`](instar_guest_sdk::Sink::finish).
    pub fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.out.barrier(io)
    }
}
