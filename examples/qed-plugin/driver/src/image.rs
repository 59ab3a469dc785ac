//! An open image: its tables, in pieces, and what has to hold of them.

use crate::header::{Header, HEADER_BYTES};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageInfo, Request};
use instar_guest_sdk::{checked_end, BlockIo, DriverError, DriverResult};

/// Tables are read and written in pieces of this many bytes: no cluster is smaller.
pub const PIECE: u64 = 4096;
/// Pieces that are held at most between two steps: 8 MiB.
const HELD: usize = 2048;
/// Clusters of the file that are verified in one go: 16 MiB of bits.
const WINDOW: u64 = 1 << 27;

pub struct Image {
    pub device: u32,
    pub header: Header,
    /// Bytes of the file in whole clusters: what lies behind is nobody's.
    pub end: u64,
    pieces: BTreeMap<u64, Vec<u8>>,
    corrupt: ErrorCode,
}

impl Image {
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let mut bytes = [0; HEADER_BYTES];
        io.read(device.device, 0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|text| DriverError::new(corrupt, text).at(device.device, 0))?;
        if (header.image_size, header.cluster_size) != (device.virtual_size, device.cluster_size) {
            let text = "the header is not the one that the host has seen";
            return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(device.device, 0));
        }
        let end = device.file_length - device.file_length % header.cluster_size;
        let image = Self { device: device.device, header, end, pieces: BTreeMap::new(), corrupt };
        if !image.holds(header.l1_table, header.table_bytes) {
            return Err(image.error(40, "the L1 table goes past the end of the file"));
        }
        Ok(image)
    }

    pub fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.header.image_size, cluster_size: self.header.cluster_size }
    }

    pub fn error(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    /// Whether a range lies within the file.
    fn holds(&self, offset: u64, length: u64) -> bool {
        checked_end(offset, length, self.end).is_some()
    }

    /// The entry at this byte of the file. The piece around it is kept.
    pub fn entry(&mut self, io: &mut dyn BlockIo, at: u64) -> DriverResult<u64> {
        let start = at - at % PIECE;
        if !self.pieces.contains_key(&start) {
            let mut bytes = vec![0; PIECE as usize];
            io.read(self.device, start, &mut bytes)?;
            self.pieces.insert(start, bytes);
        }
        let index = (at % PIECE) as usize;
        let bytes = self.pieces.get(&start).and_then(|piece| piece.get(index..index + 8)).unwrap_or_default();
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// Change an entry in memory. Its piece is held.
    pub fn set_entry(&mut self, at: u64, value: u64) {
        let piece = self.pieces.entry(at - at % PIECE).or_insert_with(|| vec![0; PIECE as usize]);
        let index = (at % PIECE) as usize;
        piece[index..index + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Write the pieces around these entries; then forget what is more than may be held.
    pub fn write_entries(&mut self, io: &mut dyn BlockIo, entries: &mut Vec<u64>) -> DriverResult<()> {
        entries.iter_mut().for_each(|at| *at -= *at % PIECE);
        entries.dedup();
        let write = |at| Some(Request::write(self.device, at, self.pieces.get(&at)?.as_ptr() as u64, PIECE));
        io.run(&mut entries.drain(..).filter_map(write).collect::<Vec<_>>())
    }

    /// Forget the pieces, if they are many. None of them may have been changed and not written.
    pub fn shrink(&mut self) {
        if self.pieces.len() > HELD {
            self.pieces.clear();
        }
    }

    /// The L2 table with this index, verified to lie in the file.
    pub fn table(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<Option<u64>> {
        let at = self.header.l1_table + index * 8;
        let table = self.entry(io, at)?;
        let good = table % self.header.cluster_size == 0 && table >= self.header.header_bytes;
        if table == 0 || good && self.holds(table, self.header.table_bytes) {
            return Ok((table != 0).then_some(table));
        }
        Err(self.error(at, format!("L1 entry {index} points to offset {table}, which cannot be a table")))
    }

    /// An L2 entry, which stands at byte `at`: 0, 1 for zeroes, or a cluster that lies in the file.
    pub fn cluster(&mut self, io: &mut dyn BlockIo, at: u64) -> DriverResult<u64> {
        let (offset, size) = (self.entry(io, at)?, self.header.cluster_size);
        if offset <= 1 || offset % size == 0 && offset >= self.header.header_bytes && self.holds(offset, size) {
            return Ok(offset);
        }
        Err(self.error(at, format!("an L2 entry points to offset {offset}, which cannot be a cluster")))
    }

    /// Verify all tables: everything inside the file, and nothing twice. Returns the number of clusters that are held.
    pub fn verify(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let clusters = self.end / self.header.cluster_size;
        let (mut start, mut held) = (0, 0);
        while start < clusters {
            let window = start..clusters.min(start + WINDOW);
            start = window.end;
            held = self.verify_window(io, window)?;
        }
        Ok(held)
    }

    fn verify_window(&mut self, io: &mut dyn BlockIo, window: Range<u64>) -> DriverResult<u64> {
        let size = self.header.cluster_size;
        let mut words = vec![0u64; ((window.end - window.start) as usize).div_ceil(64)];
        let mut mark = |offset: u64, length: u64| {
            (offset / size..(offset + length) / size).filter(|cluster| window.contains(cluster)).all(|cluster| {
                let (word, bit) = ((cluster - window.start) as usize / 64, 1 << ((cluster - window.start) % 64));
                let free = words[word] & bit == 0;
                words[word] |= bit;
                free
            })
        };
        let twice = |image: &Self, at| Err(image.error(at, "an entry points to what something else uses"));
        let mut held = 0;
        mark(self.header.l1_table, self.header.table_bytes);
        for index in 0..self.header.entries() {
            self.shrink();
            let Some(table) = self.table(io, index)? else { continue };
            if !mark(table, self.header.table_bytes) {
                return twice(self, self.header.l1_table + index * 8);
            }
            for at in (table..table + self.header.table_bytes).step_by(8) {
                self.shrink();
                let offset = self.cluster(io, at)?;
                held += u64::from(offset != 0);
                if offset > 1 && !mark(offset, size) {
                    return twice(self, at);
                }
            }
        }
        Ok(held)
    }
}
