//! Reading a table, a window at a time: it may be far longer than the memory of the sandbox.

use super::SECTOR;
use crate::error::{overflow, DriverResult};
use crate::holes::Holes;
use crate::io::BlockIo;
use alloc::vec::Vec;

/// Bytes that are read at once, at most.
const MOST: u64 = 64 << 10;

/// The part of a table that was read last: whole sectors of the file.
#[derive(Clone, Debug)]
pub struct Window {
    device: u32,
    start: u64,
    end: u64,
    /// Empty for a hole.
    bytes: Vec<u8>,
    most: u64,
    /// `None`: holes are read as any other part.
    holes: Option<Holes>,
}

impl Window {
    /// Nothing was read. `cache_bytes` bounds what is held, to no less than a sector; 0: no bound.
    pub fn new(device: u32, cache_bytes: u64, holes: Option<Holes>) -> Self {
        let bound = cache_bytes - cache_bytes % SECTOR;
        let most = if cache_bytes == 0 { MOST } else { bound.clamp(SECTOR, MOST) };
        Self { device, start: 0, end: 0, bytes: Vec::new(), most, holes }
    }

    /// Hold the sector of byte `at` of the file. If it has to be read, what follows up to byte `end` is read with it, as far as
    /// there is room.
    ///
    /// # Errors
    /// I/O errors.
    pub fn hold(&mut self, io: &mut dyn BlockIo, at: u64, end: u64) -> DriverResult<()> {
        if (self.start..self.end).contains(&at) {
            return Ok(());
        }
        let start = at - at % SECTOR;
        let length = end.saturating_sub(start).clamp(SECTOR, self.most).next_multiple_of(SECTOR);
        let end = start.checked_add(length).ok_or_else(|| overflow("a place in a table"))?;
        // Should reading fail, nothing is held.
        (self.start, self.end) = (start, start);
        self.bytes.clear();
        let range = start..end;
        let holds_data = match &mut self.holes {
            Some(holes) => holes.hold_data(io, self.device, &[range])?.first() != Some(&false),
            None => true,
        };
        if holds_data {
            self.bytes.resize(usize::try_from(length).map_err(|_| overflow("a part of a table"))?, 0);
            io.read(self.device, start, &mut self.bytes)?;
        }
        self.end = end;
        Ok(())
    }

    /// Bytes that are held; nothing in a hole, or outside.
    pub fn bytes(&self, at: u64, length: u64) -> &[u8] {
        let part = || {
            let start = usize::try_from(at.checked_sub(self.start)?).ok()?;
            self.bytes.get(start..start.checked_add(usize::try_from(length).ok()?)?)
        };
        part().unwrap_or_default()
    }

    /// The sector around byte `at`, which is held.
    pub fn sector(&self, at: u64) -> Vec<u8> {
        let mut sector = self.bytes(at - at % SECTOR, SECTOR).to_vec();
        sector.resize(512, 0);
        sector
    }

    /// Where the hole ends, as far as it is held, if byte `at` lies in one.
    pub fn hole_end(&self, at: u64) -> Option<u64> {
        (self.bytes.is_empty() && (self.start..self.end).contains(&at)).then_some(self.end)
    }

    /// Drop what was read: the file is another one now, and its holes are others.
    pub fn forget(&mut self) {
        (self.start, self.end) = (0, 0);
        self.bytes = Vec::new();
        self.holes = self.holes.take().map(|_| Holes::default());
    }
}
