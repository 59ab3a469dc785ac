//! The L2 tables that are walked: many pieces of them are read at once, and only those that hold anything.

use crate::image::{overflow, Image};
use crate::scan::decode_l1;
use crate::table_reader::{is_zero, TableReader};
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, Holes};
use instar_qcow2_format::HostOffset;

/// L2 tables are read in pieces of at most this many bytes …
const PIECE_BYTES: u64 = 64 << 10;
/// … and at most this many bytes of them are held at once.
const WINDOW_BYTES: u64 = 2 << 20;
/// At most this many pieces are held at once, whatever their size.
const WINDOW_PIECES: usize = 2048;

/// Where a piece of an L2 table is.
struct Place {
    /// Which piece of the virtual disk's mapping: guest offset divided by what a piece maps.
    index: u64,
    /// Byte offset in the file.
    host: u64,
    /// Byte offset in the window's buffer.
    start: usize,
}

/// A piece of an L2 table.
pub struct Piece<'a> {
    /// The first guest byte that it maps.
    pub guest: u64,
    /// The guest byte after those that it maps.
    pub end: u64,
    /// Byte offset in the file.
    pub host: u64,
    /// Its entries.
    pub bytes: &'a [u8],
}

/// Pieces of the L2 tables that an image's L1 table names.
pub struct L2Window {
    l1: TableReader,
    /// Of these pieces, those that hold anything are here.
    window: Range<u64>,
    places: Vec<Place>,
    buffer: Vec<u8>,
    /// Tables that held nothing were read: from now on, those in holes are not.
    holes: Option<Holes>,
}

/// Bytes of a piece.
fn piece_bytes(image: &Image) -> u64 {
    // A small window holds more than one piece, too: sizes are powers of two.
    let room = (image.cache_bytes(WINDOW_BYTES) / 8).max(512);
    image.cluster_size().bytes().min(PIECE_BYTES).min(1 << room.ilog2())
}

/// Guest bytes that a piece maps.
fn coverage(image: &Image) -> u64 {
    piece_bytes(image) / image.header.l2_entry_bytes() * image.cluster_size().bytes()
}

impl L2Window {
    /// An empty window.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        Self {
            l1: TableReader::new(image.device, image.header.l1_table.0, u64::from(image.header.l1_entries)),
            window: 0..0,
            places: Vec::new(),
            buffer: Vec::new(),
            holes: None,
        }
    }

    /// The next piece that maps anything of these guest bytes. Tables are read for these bytes only.
    ///
    /// # Errors
    /// Corruption of the L1 table, and I/O errors.
    pub fn next(&mut self, io: &mut dyn BlockIo, image: &Image, guest: Range<u64>) -> DriverResult<Option<Piece<'_>>> {
        let coverage = coverage(image);
        let end = guest.end.min(image.mapped_size()).div_ceil(coverage);
        let mut index = guest.start / coverage;
        while index < end {
            if !self.window.contains(&index) {
                self.fill(io, image, index..end)?;
            }
            let position = self.places.partition_point(|place| place.index < index);
            let Some(place) = self.places.get(position) else {
                index = self.window.end;
                continue;
            };
            if place.index >= end {
                break;
            }
            let length = usize::try_from(piece_bytes(image)).map_err(|_| overflow("the size of a piece"))?;
            let bytes = self.buffer.get(place.start..place.start + length).unwrap_or_default();
            let guest = place.index * coverage;
            return Ok(Some(Piece { guest, end: guest.saturating_add(coverage), host: place.host, bytes }));
        }
        Ok(None)
    }

    /// Make the window begin with the first of these pieces.
    fn fill(&mut self, io: &mut dyn BlockIo, image: &Image, pieces: Range<u64>) -> DriverResult<()> {
        let size = usize::try_from(piece_bytes(image)).map_err(|_| overflow("the size of a piece"))?;
        self.window = 0..0;
        let room = usize::try_from(image.cache_bytes(WINDOW_BYTES)).unwrap_or(usize::MAX);
        let end = self.choose(io, image, pieces.clone(), (room / size).clamp(1, WINDOW_PIECES))?;
        self.read(io, image, size)?;
        let (buffer, read) = (&self.buffer, self.places.len());
        self.places.retain(|place| !is_zero(buffer.get(place.start..place.start + size).unwrap_or_default()));
        if self.places.len() < read && self.holes.is_none() {
            self.holes = Some(Holes::default());
        }
        self.window = pieces.start..end;
        Ok(())
    }

    /// Choose the pieces that L1 entries name, `capacity` at most, without those in holes once any held nothing. Returns the
    /// index of the piece after the last one that was looked at.
    fn choose(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        pieces: Range<u64>,
        capacity: usize,
    ) -> DriverResult<u64> {
        let bytes = piece_bytes(image);
        let per_table = image.cluster_size().bytes() / bytes;
        self.places.clear();
        let mut index = pieces.start;
        while index < pieces.end && self.places.len() < capacity {
            let tables = index / per_table..pieces.end.div_ceil(per_table);
            let Some((number, table)) = self.next_table(io, image, tables)? else {
                index = pieces.end;
                break;
            };
            index = index.max(number * per_table);
            let table_end = pieces.end.min((number + 1) * per_table);
            while index < table_end && self.places.len() < capacity {
                self.places.push(Place { index, host: table.0 + index % per_table * bytes, start: 0 });
                index += 1;
            }
        }
        if let Some(holes) = &mut self.holes {
            let ranges: Vec<_> = self.places.iter().map(|place| place.host..place.host + bytes).collect();
            let mut data = holes.hold_data(io, image.device, &ranges)?.into_iter();
            self.places.retain(|_| data.next().unwrap_or(true));
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

    /// Read the pieces that were chosen, which have `size` bytes each.
    fn read(&mut self, io: &mut dyn BlockIo, image: &Image, size: usize) -> DriverResult<()> {
        let bytes = size as u64;
        // Only what is read into is ever touched: an ancestor of which gaps are read keeps a piece or two.
        self.buffer.resize(self.buffer.len().max(self.places.len() * size), 0);
        let base = self.buffer.as_mut_ptr() as u64;
        let mut requests: Vec<Request> = Vec::with_capacity(self.places.len());
        for (number, place) in self.places.iter_mut().enumerate() {
            place.start = number * size;
            match requests.last_mut() {
                // Tables that follow each other in the file are one read.
                Some(last) if last.offset + last.length == place.host => last.length += bytes,
                _ => requests.push(Request::read(image.device, place.host, base + place.start as u64, bytes)),
            }
        }
        if requests.is_empty() {
            return Ok(());
        }
        io.run(&mut requests)
    }
}
