//! The L2 tables that are walked: many slices of them are read at once, and only those that hold anything.

use crate::image::{overflow, Image};
use crate::metadata::entries::decode_l1;
use crate::metadata::table_reader::{is_zero, TableReader};
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, Holes};
use instar_qcow2_format::HostOffset;

/// L2 tables are read in slices of at most this many bytes …
const SLICE_BYTES: u64 = 64 << 10;
/// … and at most this many bytes of them are held at once.
const WINDOW_BYTES: u64 = 2 << 20;
/// At most this many slices are held at once, whatever their size.
const WINDOW_SLICES: usize = 2048;

/// Where a slice of an L2 table is.
struct HeldSlice {
    /// Which slice of the virtual disk's mapping: guest offset divided by what a slice maps.
    index: u64,
    /// Byte offset in the file.
    host: u64,
    /// Byte offset in the window's buffer.
    start: usize,
}

/// A slice of an L2 table.
pub struct L2Slice<'a> {
    /// The first guest byte that it maps.
    pub guest: u64,
    /// The guest byte after those that it maps.
    pub end: u64,
    /// Byte offset in the file.
    pub host: u64,
    /// Its entries.
    pub bytes: &'a [u8],
}

/// L2Slices of the L2 tables that an image's L1 table names.
pub struct L2Slices {
    l1: TableReader,
    /// Of these slices, those that hold anything are here.
    window: Range<u64>,
    held: Vec<HeldSlice>,
    buffer: Vec<u8>,
    /// Tables that held nothing were read: from now on, those in holes are not.
    holes: Option<Holes>,
}

/// Bytes of a slice.
fn slice_bytes(image: &Image) -> u64 {
    // A small window holds more than one slice, too: sizes are powers of two.
    let room = (image.cache_bytes(WINDOW_BYTES) / 8).max(512);
    image.cluster_size().bytes().min(SLICE_BYTES).min(1 << room.ilog2())
}

/// Guest bytes that a slice maps.
fn coverage(image: &Image) -> u64 {
    slice_bytes(image) / image.header.l2_entry_bytes() * image.cluster_size().bytes()
}

impl L2Slices {
    /// An empty window.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        Self {
            l1: TableReader::new(image.device, image.header.l1_table.0, u64::from(image.header.l1_entries)),
            window: 0..0,
            held: Vec::new(),
            buffer: Vec::new(),
            holes: None,
        }
    }

    /// The next slice that maps anything of these guest bytes. Tables are read for these bytes only.
    ///
    /// # Errors
    /// Corruption of the L1 table, and I/O errors.
    pub fn next(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        guest: Range<u64>,
    ) -> DriverResult<Option<L2Slice<'_>>> {
        let coverage = coverage(image);
        let end = guest.end.min(image.mapped_size()).div_ceil(coverage);
        let mut index = guest.start / coverage;
        while index < end {
            if !self.window.contains(&index) {
                self.fill(io, image, index..end)?;
            }
            let position = self.held.partition_point(|slice| slice.index < index);
            let Some(slice) = self.held.get(position) else {
                index = self.window.end;
                continue;
            };
            if slice.index >= end {
                break;
            }
            let length = usize::try_from(slice_bytes(image)).map_err(|_| overflow("the size of a slice"))?;
            let bytes = self.buffer.get(slice.start..slice.start + length).unwrap_or_default();
            let guest = slice.index * coverage;
            return Ok(Some(L2Slice { guest, end: guest.saturating_add(coverage), host: slice.host, bytes }));
        }
        Ok(None)
    }

    /// Make the window begin with the first of these slices.
    fn fill(&mut self, io: &mut dyn BlockIo, image: &Image, slices: Range<u64>) -> DriverResult<()> {
        let size = usize::try_from(slice_bytes(image)).map_err(|_| overflow("the size of a slice"))?;
        self.window = 0..0;
        let room = usize::try_from(image.cache_bytes(WINDOW_BYTES)).unwrap_or(usize::MAX);
        let end = self.choose(io, image, slices.clone(), (room / size).clamp(1, WINDOW_SLICES))?;
        self.read(io, image, size)?;
        let (buffer, read) = (&self.buffer, self.held.len());
        self.held.retain(|slice| !is_zero(buffer.get(slice.start..slice.start + size).unwrap_or_default()));
        if self.held.len() < read && self.holes.is_none() {
            self.holes = Some(Holes::default());
        }
        self.window = slices.start..end;
        Ok(())
    }

    /// Choose the slices that L1 entries name, `capacity` at most, without those in holes once any held nothing. Returns the
    /// index of the slice after the last one that was looked at.
    fn choose(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        slices: Range<u64>,
        capacity: usize,
    ) -> DriverResult<u64> {
        let bytes = slice_bytes(image);
        let per_table = image.cluster_size().bytes() / bytes;
        self.held.clear();
        let mut index = slices.start;
        while index < slices.end && self.held.len() < capacity {
            let tables = index / per_table..slices.end.div_ceil(per_table);
            let Some((number, table)) = self.next_table(io, image, tables)? else {
                index = slices.end;
                break;
            };
            index = index.max(number * per_table);
            let table_end = slices.end.min((number + 1) * per_table);
            while index < table_end && self.held.len() < capacity {
                self.held.push(HeldSlice { index, host: table.0 + index % per_table * bytes, start: 0 });
                index += 1;
            }
        }
        if let Some(holes) = &mut self.holes {
            let ranges: Vec<_> = self.held.iter().map(|slice| slice.host..slice.host + bytes).collect();
            let mut data = holes.hold_data(io, image.device, &ranges)?.into_iter();
            self.held.retain(|_| data.next().unwrap_or(true));
        }
        Ok(index)
    }

    /// The first L2 table that these L1 entries name, and the index of the entry.
    fn next_table(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        entries: Range<u64>,
    ) -> DriverResult<Option<(u64, HostOffset)>> {
        let mut index = entries.start;
        while let Some((found, raw)) = self.l1.next(io, index, entries.end)? {
            if let Some((table, _)) = decode_l1(image, found, self.l1.at(found), raw)? {
                return Ok(Some((found, table)));
            }
            index = found + 1;
        }
        Ok(None)
    }

    /// Read the slices that were chosen, which have `size` bytes each.
    fn read(&mut self, io: &mut dyn BlockIo, image: &Image, size: usize) -> DriverResult<()> {
        let bytes = size as u64;
        // Only what is read into is ever touched: an ancestor of which gaps are read keeps a slice or two.
        self.buffer.resize(self.buffer.len().max(self.held.len() * size), 0);
        let base = self.buffer.as_mut_ptr() as u64;
        let mut requests: Vec<Request> = Vec::with_capacity(self.held.len());
        for (number, slice) in self.held.iter_mut().enumerate() {
            slice.start = number * size;
            match requests.last_mut() {
                // Tables that follow each other in the file are one read.
                Some(last) if last.offset + last.length == slice.host => last.length += bytes,
                _ => requests.push(Request::read(image.device, slice.host, base + slice.start as u64, bytes)),
            }
        }
        if requests.is_empty() {
            return Ok(());
        }
        io.run(&mut requests)
    }
}
