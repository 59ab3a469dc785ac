//! Writing into a stream-optimized extent, whose grains are compressed and keep their bytes: new ones are added, in the
//! order of [`sparse_sink`](crate::sparse_sink).
//!
//! Where the grain directory is at the end, a footer names it, and nothing can follow that. No order of appending grains and
//! another footer survives every crash: the file may have become longer, and its last bytes be anything. But the header in
//! front may say itself where the directory is. So its sector takes over what the footer says, in one write: before it the
//! footer holds, after it the header, and both say the same. With that durable, the footer is free space.

use crate::decide::{decide, Action};
use crate::sparse_sink::{Pending, SparseSink};
use crate::tables::Table;
use crate::work::{Group, Part};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, Extent, ReadBelow};
use instar_vmdk_format::{Grain, Header, Place, FOOTER_BYTES, HEADER_BYTES, SECTOR};

/// A grain that is gathered until it is whole: its first guest byte, and its bytes.
#[derive(Debug)]
pub struct OpenGrain {
    guest: u64,
    bytes: Vec<u8>,
}

impl OpenGrain {
    /// Put what arrives for a part of the grain into its place.
    fn put(&mut self, io: &mut dyn BlockIo, extent: &Extent) -> DriverResult<()> {
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| overflow("a part of a grain"));
        let (start, length) = (size(extent.guest_offset.saturating_sub(self.guest))?, size(extent.length)?);
        let part = self.bytes.get_mut(start..).and_then(|rest| rest.get_mut(..length));
        extent.content.read(io, part.ok_or_else(|| overflow("a part of a grain"))?)
    }
}

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

    /// Take what arrives for a part of a grain: gather a new one, and write it once it is whole.
    pub(crate) fn pack(
        &mut self,
        io: &mut dyn BlockIo,
        tables: &mut [Table],
        slot: usize,
        part: &Part,
        below: &mut dyn ReadBelow,
        pending: &mut Pending,
    ) -> DriverResult<()> {
        if self.open.as_ref().is_some_and(|open| open.guest != part.grain) {
            self.close(tables, pending)?;
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => {
                let table = tables.get_mut(slot).ok_or_else(|| overflow("a table"))?;
                let entry = table.entries.get_mut(part.entry).ok_or_else(|| overflow("an entry"))?;
                let grain = self.image.layout.grain_of(*entry);
                let shows = below.exists() && part.grain < below.length();
                match decide(grain, part.arrival, self.image.layout.zeroed_grains, shows) {
                    Action::Nothing => return Ok(()),
                    // The plan has seen that already: nothing may be lost if something else has changed the file.
                    Action::InPlace(offset) => return self.planner.holds(io, &self.image, offset, part),
                    Action::MarkZero(_) => {
                        *entry = 1;
                        table.dirty = true;
                        return Ok(());
                    }
                    Action::Allocate => {
                        let size = self.image.layout.grain_bytes();
                        let mut bytes = vec![0; usize::try_from(size).map_err(|_| overflow("a grain"))?];
                        if shows && grain == Grain::Absent && !part.arrival.whole {
                            let length = usize::try_from(part.length).map_err(|_| overflow("a grain"))?;
                            below.read(io, part.grain, bytes.get_mut(..length).unwrap_or_default())?;
                        }
                        OpenGrain { guest: part.grain, bytes }
                    }
                }
            }
        };
        open.put(io, &part.extent)?;
        self.open = Some(open);
        if part.extent.end() < part.grain + part.length {
            return Ok(());
        }
        self.close(tables, pending)
    }

    /// Compress the grain that was gathered, and give it its place and its entry.
    fn close(&mut self, tables: &mut [Table], pending: &mut Pending) -> DriverResult<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let Place { table, entry, .. } = self.image.layout.place(open.guest);
        let slot = tables.binary_search_by_key(&table, |table| table.index).ok();
        let table = slot.and_then(|slot| tables.get_mut(slot)).ok_or_else(|| overflow("a table"))?;
        let sector = u32::try_from(self.next_free / SECTOR).map_err(|_| overflow("the place of a grain"))?;
        *table.entries.get_mut(entry).ok_or_else(|| overflow("an entry"))? = sector;
        table.dirty = true;
        let stored = self.compressor.stored(open.guest / SECTOR, &open.bytes);
        let stored = stored.ok_or_else(|| overflow("a compressed grain"))?;
        let end = self.next_free.checked_add(stored.len() as u64);
        pending.write(self.image.device, self.next_free, stored);
        self.next_free = end.ok_or_else(|| overflow("the length of the file"))?;
        Ok(())
    }

    /// Write the grain that the last call has left open, unless its table is one of the group's: then the group does.
    pub(crate) fn close_before(&mut self, io: &mut dyn BlockIo, group: &Group) -> DriverResult<()> {
        let Some(open) = &self.open else { return Ok(()) };
        let table = self.image.layout.place(open.guest).table;
        if group.tables.contains(&table) {
            return Ok(());
        }
        let (mut tables, mut pending) = (self.image.read_both(io, &[table])?, Pending::default());
        self.close(&mut tables, &mut pending)?;
        self.publish(io, &tables, pending)
    }
}
