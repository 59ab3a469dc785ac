//! A seSparse extent, which is only read. Guest offsets are those of the extent.
//!
//! Directory and tables are read when they are asked for: those of a disk of 64 TiB would not fit into memory.

use crate::failures::at;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, FileDevice, Request};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, Extents, Holes};
use instar_vmdk_format::{
    sesparse_entries, sesparse_table, SeGrain, SeSparseHeader, SESPARSE_COVERAGE, SESPARSE_GRAIN_BYTES,
    SESPARSE_HEADER_BYTES, SESPARSE_TABLE_BYTES,
};

/// Entries of the directory that are held: 64 KiB, which stand for 128 GiB of a disk.
const CHUNK: u64 = 8192;
/// Tables that are held: 512 KiB, which stand for 256 MiB of a disk.
const TABLES: usize = 16;

/// A grain table that holds anything.
#[derive(Debug)]
pub struct SeTable {
    /// Its index in the directory.
    pub index: u64,
    /// Its number, by which it is stored.
    pub number: u64,
    pub entries: Vec<u64>,
}

/// An open seSparse extent.
#[derive(Debug)]
pub struct SeSparse {
    pub device: u32,
    pub header: SeSparseHeader,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// First byte of the directory.
    directory: u64,
    corrupt: ErrorCode,
    /// Entries of the directory that were read last, and the index of the first of them.
    chunk: (u64, Vec<u64>),
    /// Tables that were read last, ascending: all that hold anything among those with these indices.
    tables: (Range<u64>, Vec<SeTable>),
    holes: Holes,
}

impl SeSparse {
    /// Read both headers. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// Corruption, a journal that has to be replayed, and I/O errors.
    pub fn open(io: &mut dyn BlockIo, file: &FileDevice, corrupt: ErrorCode) -> DriverResult<Self> {
        let FileDevice { device, file_length, .. } = *file;
        let mut bytes = [0; SESPARSE_HEADER_BYTES];
        io.read(device, 0, &mut bytes)?;
        let header = SeSparseHeader::parse(&bytes).map_err(at(corrupt, device, 0))?;
        let outside = |what: &str| {
            let text = format!("the {what} of the seSparse extent lies past the end of the file");
            DriverError::new(corrupt, text).at(device, 0)
        };
        let (volatile, _) = header.volatile.within(file_length).ok_or_else(|| outside("volatile header"))?;
        io.read(device, volatile, &mut bytes)?;
        SeSparseHeader::check_volatile(&bytes).map_err(at(corrupt, device, volatile))?;
        let (directory, _) = header.directory.within(file_length).ok_or_else(|| outside("grain directory"))?;
        let (chunk, tables) = ((0, Vec::new()), (0..0, Vec::new()));
        Ok(Self { device, header, file_length, directory, corrupt, chunk, tables, holes: Holes::default() })
    }

    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    /// Where a grain begins in the file.
    ///
    /// # Errors
    /// Corruption if that is not in the file.
    pub fn grain_offset(&self, guest: u64, number: u64) -> DriverResult<u64> {
        self.header.grain_at(number, self.file_length).ok_or_else(|| {
            let text = format!("the grain of guest offset {guest}, number {number}, lies past the end of the file");
            self.corrupt(0, text)
        })
    }

    /// The code of what no image may say.
    pub fn code(&self) -> ErrorCode {
        self.corrupt
    }

    /// Give back the memory of what was read last.
    pub fn forget_tables(&mut self) {
        (self.chunk, self.tables) = ((0, Vec::new()), (0..0, Vec::new()));
    }

    /// Hold the entries of the directory around `index`.
    fn load_chunk(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<()> {
        let first = index - index % CHUNK;
        if self.chunk.0 == first && !self.chunk.1.is_empty() {
            return Ok(());
        }
        let count = CHUNK.min(self.header.directory_entries().saturating_sub(first));
        let offset = self.directory + first * 8;
        let mut bytes = vec![0; usize::try_from(count * 8).map_err(|_| overflow("the directory"))?];
        let range = offset..offset + count * 8;
        if self.holes.hold_data(io, self.device, core::slice::from_ref(&range))? == [true] {
            io.read(self.device, offset, &mut bytes)?;
        }
        self.chunk = (first, sesparse_entries(&bytes).collect());
        Ok(())
    }

    /// Read some of the tables from index `from` on, up to `to`, which has to be more. [`tables`](Self::tables) has them then.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn load(&mut self, io: &mut dyn BlockIo, from: u64, to: u64) -> DriverResult<()> {
        if self.tables.0.contains(&from) {
            return Ok(());
        }
        self.load_chunk(io, from)?;
        let (first, entries) = &self.chunk;
        let (mut wanted, mut end) = (Vec::new(), from);
        let skipped = usize::try_from(from - first).map_err(|_| overflow("the directory"))?;
        for (&entry, index) in entries.iter().skip(skipped).zip(from..to) {
            if wanted.len() == TABLES {
                break;
            }
            end = index + 1;
            let place = self.directory + index * 8;
            let Some(number) = sesparse_table(entry).map_err(at(self.corrupt, self.device, place))? else { continue };
            wanted.push((index, number, self.table_offset(index, number)?));
        }
        if end == from {
            return Err(overflow("the directory"));
        }
        let tables = self.read_tables(io, &wanted)?;
        self.tables = (from..end, tables);
        Ok(())
    }

    /// The tables that were read last and hold anything, ascending, and the range of indices that was looked at.
    pub fn tables(&self) -> (Range<u64>, &[SeTable]) {
        (self.tables.0.clone(), &self.tables.1)
    }

    /// First byte of the table with this number.
    fn table_offset(&self, index: u64, number: u64) -> DriverResult<u64> {
        self.header.table_at(number, self.file_length).ok_or_else(|| {
            let text =
                format!("grain directory entry {index} names table {number}, which lies past the end of the file");
            self.corrupt(self.directory + index * 8, text)
        })
    }

    /// Read tables, given by index, number and offset. Those in holes are not read: they hold nothing.
    fn read_tables(&mut self, io: &mut dyn BlockIo, wanted: &[(u64, u64, u64)]) -> DriverResult<Vec<SeTable>> {
        let ranges: Vec<_> = wanted.iter().map(|(_, _, offset)| *offset..offset + SESPARSE_TABLE_BYTES).collect();
        let holding = self.holes.hold_data(io, self.device, &ranges)?;
        let wanted: Vec<_> = wanted.iter().zip(holding).filter(|(_, data)| *data).map(|(table, _)| table).collect();
        let size = usize::try_from(SESPARSE_TABLE_BYTES).map_err(|_| overflow("a grain table"))?;
        let mut bytes = vec![0u8; wanted.len() * size];
        let mut requests: Vec<Request> = Vec::with_capacity(wanted.len());
        for ((_, _, offset), buffer) in wanted.iter().zip(bytes.chunks_exact_mut(size)) {
            requests.push(Request::read(self.device, *offset, buffer.as_mut_ptr() as u64, SESPARSE_TABLE_BYTES));
        }
        if !requests.is_empty() {
            io.run(&mut requests)?;
        }
        let table = |(&&(index, number, _), bytes): (&&(u64, u64, u64), &[u8])| {
            let entries: Vec<u64> = sesparse_entries(bytes).collect();
            entries.iter().any(|&entry| entry != 0).then_some(SeTable { index, number, entries })
        };
        Ok(wanted.iter().zip(bytes.chunks_exact(size)).filter_map(table).collect())
    }

    /// See [`Source::extents`](instar_guest_sdk::Source::extents).
    pub fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let size = self.header.virtual_size();
        let limit = range.end.min(size);
        let mut guest = range.start - range.start % SESPARSE_GRAIN_BYTES;
        while guest < limit {
            self.load(io, guest / SESPARSE_COVERAGE, limit.div_ceil(SESPARSE_COVERAGE))?;
            let (looked_at, tables) = self.tables();
            for table in tables {
                let start = table.index.saturating_mul(SESPARSE_COVERAGE);
                if start.saturating_add(SESPARSE_COVERAGE) <= guest {
                    continue;
                }
                guest = guest.max(start);
                let skipped = usize::try_from((guest - start) / SESPARSE_GRAIN_BYTES).unwrap_or(usize::MAX);
                for &entry in table.entries.iter().skip(skipped) {
                    if guest >= limit {
                        return Ok(guest.min(size));
                    }
                    if self.extent(guest, entry)?.is_some_and(|extent| !out.push(extent)) {
                        return Ok(guest);
                    }
                    guest += SESPARSE_GRAIN_BYTES;
                }
            }
            guest = guest.max(looked_at.end.saturating_mul(SESPARSE_COVERAGE));
        }
        Ok(guest.min(size))
    }

    /// The extent of a grain, cut at the end of the disk.
    fn extent(&self, guest: u64, entry: u64) -> DriverResult<Option<Extent>> {
        let length = SESPARSE_GRAIN_BYTES.min(self.header.virtual_size().saturating_sub(guest));
        Ok(match SeGrain::decode(entry).map_err(at(self.corrupt, self.device, 0))? {
            SeGrain::Absent => None,
            SeGrain::Zero => Some(Extent::zero(guest, length)),
            SeGrain::Number(number) => {
                Some(Extent::data(guest, length, self.device, self.grain_offset(guest, number)?))
            }
        })
    }
}
