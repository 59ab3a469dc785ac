//! Reading the BAT, a window at a time. A window that lies in a hole of the file is not read.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, Holes};
use instar_parallels_format::{Header, ENTRY_BYTES, SECTOR};

/// Bytes that are read at once, at most.
pub const MOST: u64 = 64 << 10;

/// The part of the BAT that was read last: whole sectors of the file.
#[derive(Debug)]
pub struct Window {
    start: u64,
    end: u64,
    /// Empty for a hole.
    bytes: Vec<u8>,
    most: u64,
    holes: Holes,
}

/// The little-endian number in (up to) four bytes.
pub fn little_endian(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

impl Window {
    /// Nothing was read. `cache_bytes` bounds what is held; 0: no bound.
    pub fn new(cache_bytes: u64) -> Self {
        let bound = cache_bytes - cache_bytes % SECTOR;
        let most = if bound == 0 { MOST } else { bound.min(MOST) };
        Self { start: 0, end: 0, bytes: Vec::new(), most, holes: Holes::default() }
    }

    /// The entry of a cluster of the disk. If it has to be read, those up to cluster `end` are read with it, as far as there is
    /// room.
    ///
    /// # Errors
    /// I/O errors.
    pub fn get(&mut self, io: &mut dyn BlockIo, image: &Image, cluster: u64, end: u64) -> DriverResult<u32> {
        let at = Header::entry_place(cluster);
        if !(self.start..self.end).contains(&at) {
            self.load(io, image, at, Header::entry_place(end))?;
        }
        Ok(self.at(at, ENTRY_BYTES).map_or(0, little_endian))
    }

    fn load(&mut self, io: &mut dyn BlockIo, image: &Image, at: u64, end: u64) -> DriverResult<()> {
        let start = at - at % SECTOR;
        let wanted = end.saturating_sub(start).clamp(SECTOR, self.most).next_multiple_of(SECTOR);
        let end = start.checked_add(wanted).ok_or_else(|| overflow("a place in the BAT"))?;
        (self.start, self.end) = (start, start);
        let range = start..end;
        self.bytes.clear();
        if self.holes.hold_data(io, image.device, &[range])?.first() != Some(&false) {
            self.bytes.resize(usize::try_from(wanted).map_err(|_| overflow("a part of the BAT"))?, 0);
            io.read(image.device, start, &mut self.bytes)?;
        }
        self.end = end;
        Ok(())
    }

    /// Bytes that are held; `None` in a hole, or outside.
    fn at(&self, at: u64, length: u64) -> Option<&[u8]> {
        let start = usize::try_from(at.checked_sub(self.start)?).ok()?;
        self.bytes.get(start..start.checked_add(usize::try_from(length).ok()?)?)
    }

    /// How many entries, from that of a cluster on, are known to be 0 because they lie in a hole: 1 at least, for that one.
    pub fn zeroes(&self, cluster: u64) -> u64 {
        let at = Header::entry_place(cluster);
        let in_hole = self.bytes.is_empty() && (self.start..self.end).contains(&at);
        if in_hole {
            ((self.end - at) / ENTRY_BYTES).max(1)
        } else {
            1
        }
    }

    /// The sector around byte `at`, which was asked for last.
    pub fn sector(&self, at: u64) -> Vec<u8> {
        self.at(at - at % SECTOR, SECTOR).map_or_else(|| vec![0; 512], <[u8]>::to_vec)
    }

    /// Drop what was read: the file is another one now, and its holes are others.
    pub fn forget(&mut self) {
        *self = Self { most: self.most, ..Self::new(0) };
    }
}
