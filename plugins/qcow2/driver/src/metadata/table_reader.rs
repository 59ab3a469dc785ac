//! Reading a table of 64-bit entries from its front to its back.
//!
//! A table that lies in a hole takes no space, however long it is, and all of its entries are 0. So where the next data
//! begins is asked for along with each piece that is read, and holes are passed over.

use crate::image::overflow;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult};

/// Bytes that are read first, in one exit: most tables are no longer.
const FIRST_BYTES: u64 = 64 << 10;
/// Bytes that are read at once after that.
const CHUNK_BYTES: u64 = 128 << 10;

/// A reader of one table of one device.
#[derive(Debug)]
pub struct TableReader {
    device: u32,
    /// Byte offset of the table.
    base: u64,
    /// Number of its entries.
    entries: u64,
    bytes: Vec<u8>,
    /// The entries whose bytes are held.
    held: Range<u64>,
    /// Where the next data was asked for, and where it begins and ends, as byte offsets.
    next: Option<(u64, Range<u64>)>,
}

impl TableReader {
    /// A reader of `entries` entries at byte `base` of a device. Nothing is read yet.
    #[must_use]
    pub fn new(device: u32, base: u64, entries: u64) -> Self {
        Self { device, base, entries, bytes: Vec::new(), held: 0..0, next: None }
    }

    /// Byte offset in the file of entry `index`.
    #[must_use]
    pub fn at(&self, index: u64) -> u64 {
        self.base.saturating_add(index.saturating_mul(8))
    }

    /// The first entry from `index` on and before `end` that is not 0, with its index.
    ///
    /// # Errors
    /// I/O errors.
    pub fn next(&mut self, io: &mut dyn BlockIo, mut index: u64, end: u64) -> DriverResult<Option<(u64, u64)>> {
        let end = end.min(self.entries);
        while index < end {
            if !self.held.contains(&index) {
                index = self.load(io, index)?;
                continue;
            }
            let first = usize::try_from((index - self.held.start) * 8).map_err(|_| overflow("a table"))?;
            let words = self.bytes.get(first..).unwrap_or_default().chunks_exact(8);
            let found = (index..self.held.end.min(end)).zip(words).find_map(|(index, word)| {
                let raw = u64::from_be_bytes(word.try_into().unwrap_or([0; 8]));
                (raw != 0).then_some((index, raw))
            });
            if found.is_some() {
                return Ok(found);
            }
            index = self.held.end;
        }
        Ok(None)
    }

    /// Hold entry `index` and some after it; or return the index of a later entry, if there are only zeroes before that.
    fn load(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<u64> {
        let (at, table_end) = (self.at(index), self.at(self.entries));
        let known = self.next.as_ref().filter(|(asked, data)| *asked <= at && (at < data.end || data.is_empty()));
        let (limit, chunk) = match known {
            Some((_, data)) if data.is_empty() => return Ok(self.entries),
            Some((_, data)) if at < data.start && data.start - at >= 8 => {
                return Ok(index + (data.start - at) / 8);
            }
            Some((_, data)) => (data.end.min(table_end), CHUNK_BYTES),
            None => (table_end, FIRST_BYTES),
        };
        // Whole entries, one of them at least.
        let count = limit.saturating_sub(at).min(chunk).div_ceil(8).max(1);
        let length = usize::try_from(count * 8).map_err(|_| overflow("a chunk of a table"))?;
        self.held = 0..0;
        self.bytes.clear();
        self.bytes.resize(length, 0);
        let after = at + count * 8;
        let mut requests = Vec::with_capacity(2);
        requests.push(Request::read(self.device, at, self.bytes.as_mut_ptr() as u64, count * 8));
        if (known.is_none() || after >= limit) && after < table_end {
            requests.push(Request::next_data(self.device, after, table_end - after));
        }
        io.run(&mut requests)?;
        if let Some(answer) = requests.get(1) {
            let start = answer.offset.max(after);
            self.next = Some((after, start..answer.offset.saturating_add(answer.length).min(table_end).max(start)));
        }
        self.held = index..index + count;
        Ok(index)
    }
}

/// Whether all bytes are 0.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
        && bytes.chunks_exact(64).remainder().iter().all(|&byte| byte == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec;
    use instar_guest_sdk::memory::MemoryDevices;

    fn entries(io: &mut MemoryDevices, base: u64, count: u64) -> Vec<(u64, u64)> {
        let mut reader = TableReader::new(0, base, count);
        let (mut found, mut index) = (Vec::new(), 0);
        while let Some((at, raw)) = reader.next(io, index, u64::MAX).unwrap() {
            found.push((at, raw));
            index = at + 1;
        }
        found
    }

    #[test]
    fn every_entry_is_found_with_and_without_holes() {
        let count = 600_000u64;
        let wanted = [0u64, 1, 2047, 2048, 2049, 100_000, 100_001, 300_000, 599_999];
        for base in [512u64, 4096, 0] {
            let mut bytes = vec![0u8; usize::try_from(base + count * 8).unwrap()];
            for index in wanted {
                let at = usize::try_from(base + index * 8).unwrap();
                bytes[at..at + 8].copy_from_slice(&(index + 5).to_be_bytes());
            }
            let expected: Vec<_> = wanted.iter().map(|&index| (index, index + 5)).collect();
            for holes in [false, true] {
                let mut io = MemoryDevices::new([(0, bytes.clone())]);
                io.holes = holes;
                assert_eq!(entries(&mut io, base, count), expected);
                assert!(!holes || io.bytes_read < 100 << 10, "{} bytes", io.bytes_read);
                // One exit for each part that is read.
                assert!(io.submits <= if holes { 9 } else { 38 }, "{} submits", io.submits);
            }
        }
        assert_eq!(entries(&mut MemoryDevices::new([(0, vec![0; 64])]), 0, 8), []);
    }

    #[test]
    fn zeroes_are_told_from_the_rest() {
        let mut bytes = vec![0u8; 200];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 63, 64, 127, 128, 199] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
