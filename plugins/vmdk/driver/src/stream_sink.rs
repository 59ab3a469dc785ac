//! Writing into a stream-optimized extent, whose grains are compressed and keep their bytes: new ones are added, in the
//! order of [`sparse_sink`](crate::sparse_sink).
//!
//! Where the grain directory is at the end, a footer names it, and nothing can follow that. No order of appending grains and
//! another footer survives every crash: the file may have become longer, and its last bytes be anything. But the header in
//! front may say itself where the directory is. So its sector takes over what the footer says, in one write: before it the
//! footer holds, after it the header, and both say the same. With that durable, the footer is free space.

use crate::sparse_sink::{Pending, SparseSink};
use crate::tables::Table;
use crate::work::{GrainPart, Group, OpenGrain};
use alloc::vec;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, ReadBelow};
use instar_vmdk_format::{Header, Place, FOOTER_BYTES, HEADER_BYTES, SECTOR};

impl SparseSink {
    /// Have the header say where the grain directory is, durably.
    pub(crate) fn leave_stream(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let (mut front, mut footer) = ([0; HEADER_BYTES], [0; FOOTER_BYTES]);
        io.read(self.image.device, 0, &mut front)?;
        io.read(self.image.device, self.image.file_length - FOOTER_BYTES as u64, &mut footer)?;
        self.out.write(io, 0, &Header::in_front(&front, &footer))?;
        self.out.barrier(io)?;
        self.image.footer = false;
        Ok(())
    }

    /// Take what arrives for a part of the grain that is gathered. For one of another grain, `false`: the gathered one is
    /// written then.
    pub(crate) fn goes_on(
        &mut self,
        io: &mut dyn BlockIo,
        tables: &mut [Table],
        part: &GrainPart,
        pending: &mut Pending,
    ) -> DriverResult<bool> {
        let same = self.open.as_ref().is_some_and(|open| open.guest == part.grain);
        if same {
            self.put(io, tables, part, pending)?;
        } else {
            self.close(io, tables, pending)?;
        }
        Ok(same)
    }

    /// Gather a new grain, over what shows from below.
    pub(crate) fn gather(
        &mut self,
        io: &mut dyn BlockIo,
        tables: &mut [Table],
        part: &GrainPart,
        below: Option<&mut dyn ReadBelow>,
        pending: &mut Pending,
    ) -> DriverResult<()> {
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| overflow("a grain"));
        let mut bytes = vec![0; size(self.image.layout.grain_bytes())?];
        if let Some(below) = below.filter(|_| !part.arrival.whole) {
            below.read(io, part.grain, bytes.get_mut(..size(part.length)?).unwrap_or_default())?;
        }
        self.open = Some(OpenGrain { guest: part.grain, bytes });
        self.put(io, tables, part, pending)
    }

    /// Put what arrives for a part of the open grain into its place, and write the grain if that was the last one.
    fn put(
        &mut self,
        io: &mut dyn BlockIo,
        tables: &mut [Table],
        part: &GrainPart,
        pending: &mut Pending,
    ) -> DriverResult<()> {
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| overflow("a part of a grain"));
        let (start, length) = (size(part.extent.guest_offset - part.grain)?, size(part.extent.length)?);
        let rest = self.open.as_mut().and_then(|open| open.bytes.get_mut(start..));
        let place = rest.and_then(|rest| rest.get_mut(..length)).ok_or_else(|| overflow("a part of a grain"))?;
        part.extent.content.read(io, place)?;
        if part.extent.end() < part.grain + part.length {
            return Ok(());
        }
        self.close(io, tables, pending)
    }

    /// Compress the grain that was gathered, if there is one, and give it its place and its entry.
    fn close(&mut self, io: &mut dyn BlockIo, tables: &mut [Table], pending: &mut Pending) -> DriverResult<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let Place { table, entry, .. } = self.image.layout.place(open.guest);
        let slot = tables.binary_search_by_key(&table, |table| table.index).ok();
        let table = slot.and_then(|slot| tables.get_mut(slot)).ok_or_else(|| overflow("a table"))?;
        let stored = self.compressor.stored(open.guest / SECTOR, &open.bytes);
        let stored = stored.ok_or_else(|| overflow("a compressed grain"))?;
        let sector = self.space.take(stored.len() as u64)?;
        *table.entries.get_mut(entry).ok_or_else(|| overflow("an entry"))? = sector;
        table.dirty = true;
        pending.data.push_bytes(self.image.device, u64::from(sector) * SECTOR, stored);
        pending.data.submit_if_full(io, &mut self.out)
    }

    /// Write the grain that the last call has left open, unless its table is one of the group's: then the group does.
    pub(crate) fn close_before(&mut self, io: &mut dyn BlockIo, group: &Group) -> DriverResult<()> {
        let Some(open) = &self.open else { return Ok(()) };
        let table = self.image.layout.place(open.guest).table;
        if group.tables.contains(&table) {
            return Ok(());
        }
        let (mut tables, mut pending) = (self.image.read_both(io, &[table])?, Pending::default());
        self.close(io, &mut tables, &mut pending)?;
        self.publish(io, &tables, pending)
    }
}
