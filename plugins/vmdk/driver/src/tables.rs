//! Grain tables: many read with one submit.

use crate::image::{Directory, Image};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::table::Used;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, Holes};
use instar_vmdk_format::{entries, Layout, SECTOR};

/// Bytes of the tables that are held at once.
const BYTES_AT_ONCE: u64 = 2 << 20;
/// The number of tables whose reading takes as long as asking the host whether they lie in a hole.
const TABLES_UNASKED: usize = 16;

/// How many tables are held at once: 1,024 hosted ones, 128 of ESX.
pub fn tables_at_once(layout: &Layout) -> usize {
    usize::try_from(BYTES_AT_ONCE / layout.table_bytes().max(1)).unwrap_or(1)
}

/// What is done with tables that were read.
pub type EachTables<'a> = &'a mut dyn FnMut(&mut dyn BlockIo, &[Table]) -> DriverResult<()>;

/// A grain table in memory.
#[derive(Clone, Debug)]
pub struct Table {
    /// Its index in the grain directory.
    pub index: usize,
    /// Its entries.
    pub entries: Vec<u32>,
    /// It differs from what is in the file.
    pub dirty: bool,
}

impl Image {
    /// Byte offset of a table that a directory's entry names; `None` for one that is not there, or not yet.
    ///
    /// # Errors
    /// Corruption if it lies outside the file, or in the header.
    pub fn table_offset(&self, directory: &Directory, index: usize) -> DriverResult<Option<u64>> {
        let sector = *directory.entries.get(index).ok_or_else(|| overflow("the index of a grain table"))?;
        if sector == 0 || index >= self.unwritten {
            return Ok(None);
        }
        let offset = u64::from(sector) * SECTOR;
        if offset + self.layout.table_bytes() > self.file_length {
            let text = format!("grain directory entry {index} points to sector {sector}, past the end of the file");
            return Err(self.corrupt(offset, text));
        }
        Ok(Some(offset))
    }

    /// The tables with these indices, from both directories: those of which the second copy differs, as a crash may leave it,
    /// are dirty. The first one counts, for QEMU reads that, too.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn read_both(&self, io: &mut dyn BlockIo, indices: &[usize]) -> DriverResult<Vec<Table>> {
        let mut tables = self.read_tables(io, &self.directory, indices)?;
        if let Some(redundant) = &self.redundant {
            for (table, copy) in tables.iter_mut().zip(self.read_tables(io, redundant, indices)?) {
                table.dirty = table.entries != copy.entries;
            }
        }
        Ok(tables)
    }

    /// The tables with these indices, from one of the directories. A table that is not there is all zero.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn read_tables(
        &self,
        io: &mut dyn BlockIo,
        directory: &Directory,
        indices: &[usize],
    ) -> DriverResult<Vec<Table>> {
        let length = self.layout.table_bytes();
        let size = usize::try_from(length).map_err(|_| overflow("a grain table"))?;
        let mut bytes = vec![0u8; indices.len().checked_mul(size).ok_or_else(|| overflow("grain tables"))?];
        let mut reads: Vec<Request> = Vec::with_capacity(indices.len());
        let buffer = bytes.as_mut_ptr() as u64;
        for (&index, slot) in indices.iter().zip(0u64..) {
            let Some(offset) = self.table_offset(directory, index)? else { continue };
            reads.push(Request::read(self.device, offset, buffer + slot * length, length));
        }
        if reads.len() > TABLES_UNASKED {
            // Most programs allocate all tables of a new image at once, in a hole.
            let ranges: Vec<_> = reads.iter().map(|read| read.offset..read.offset + length).collect();
            let mut data = Holes::default().hold_data(io, self.device, &ranges)?.into_iter();
            reads.retain(|_| data.next().unwrap_or(true));
        }
        // Tables are usually one after the other.
        let mut requests = Batch::new();
        reads.into_iter().for_each(|read| requests.push(read));
        requests.submit(io)?;
        let table = |(&index, bytes): (&usize, &[u8])| Table { index, entries: entries(bytes).collect(), dirty: false };
        Ok(indices.iter().zip(bytes.chunks_exact(size)).map(table).collect())
    }

    /// Hand all tables of a directory that are there, or those of them that are in `only`, to `each`, some at once, in
    /// ascending order.
    ///
    /// # Errors
    /// Those of `each`; corruption and I/O errors.
    pub fn each_tables(
        &self,
        io: &mut dyn BlockIo,
        directory: &Directory,
        only: Option<&Used>,
        each: EachTables<'_>,
    ) -> DriverResult<()> {
        let most = tables_at_once(&self.layout);
        let mut wanted = directory.present().filter(|&index| only.is_none_or(|only| only.contains(index as u64)));
        let mut chunk = Vec::with_capacity(most);
        loop {
            chunk.clear();
            chunk.extend(wanted.by_ref().take(most));
            if chunk.is_empty() {
                return Ok(());
            }
            let mut tables = self.read_tables(io, directory, &chunk)?;
            if self.merges {
                self.merge(io, &mut tables, &chunk)?;
            }
            each(io, &tables)?;
        }
    }

    /// The tables of a directory that hold anything.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn used_tables(&self, io: &mut dyn BlockIo, directory: &Directory) -> DriverResult<Used> {
        let mut used = Used::of(0..directory.entries.len() as u64)?;
        self.each_tables(io, directory, None, &mut |_, tables| {
            for table in tables.iter().filter(|table| table.holds_anything()) {
                used.add(table.index as u64);
            }
            Ok(())
        })?;
        Ok(used)
    }
}

impl Table {
    /// Whether any entry says anything.
    pub fn holds_anything(&self) -> bool {
        self.entries.iter().any(|&entry| entry != 0)
    }
}
