//! An entry of the log (2.3.1): what it takes to be valid, and how one is made.

use crate::{crc, put, u32_at, u64_at, Guid};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Bytes of a sector of the log, and of what a data descriptor replaces.
pub const LOG_SECTOR: usize = 4096;
/// Most pages that an entry made here replaces, so that three of the longest fit into the shortest log: wherever one stands, the
/// next one fits behind it or in front of it.
pub const PAGES_PER_ENTRY: usize = 80;

const LOGE: [u8; 4] = *b"loge";
const ZERO: [u8; 4] = *b"zero";
const DESC: [u8; 4] = *b"desc";
const DATA: [u8; 4] = *b"data";
const HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;
/// Bytes at either end of a page that its descriptor has.
const LEADING: usize = 8;
const TRAILING: usize = 4;

/// A change that an entry makes to the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// The page at byte `offset` becomes this one.
    Page {
        /// Byte offset in the file, a multiple of 4096.
        offset: u64,
        /// 4096 bytes.
        bytes: Vec<u8>,
    },
    /// This byte range of the file becomes zero.
    Zero(Range<u64>),
}

/// A valid entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Byte offset in the log.
    pub at: usize,
    /// Bytes.
    pub length: usize,
    /// Byte offset in the log of the oldest entry whose updates may not be in their places.
    pub tail: usize,
    /// One more than that of the entry before it.
    pub sequence: u64,
    /// A file that is shorter was cut off, in bytes.
    pub flushed_file: u64,
    /// How long the file is at least, in bytes.
    pub last_file: u64,
    /// In their order.
    pub updates: Vec<Update>,
}

/// `length` bytes of the ring from byte `at` on.
fn of_ring(log: &[u8], at: usize, length: usize) -> Vec<u8> {
    let first = log.get(at..).unwrap_or_default();
    let first = &first[..first.len().min(length)];
    let mut bytes = first.to_vec();
    bytes.extend_from_slice(log.get(..length - first.len()).unwrap_or_default());
    bytes
}

impl LogEntry {
    /// How long the entry at byte `at` of a log would be if it is one: signature, GUID and length are those of an entry.
    #[must_use]
    pub fn claimed_length(log: &[u8], at: usize, guid: &Guid) -> Option<usize> {
        let header = log.get(at..at.checked_add(HEADER_BYTES)?)?;
        let length = usize::try_from(u32_at(header, 8)).ok()?;
        let known = header[..4] == LOGE && Guid::at(header, 32) == *guid;
        (known && length >= LOG_SECTOR && length.is_multiple_of(LOG_SECTOR) && length <= log.len()).then_some(length)
    }

    /// The entry at byte `at` of a log, a multiple of 4096; `None` if there is no valid one. It is valid with the right
    /// signature, GUID and checksum, if all of it is in the log, and if each of its descriptors and data sectors has its
    /// sequence number.
    #[must_use]
    pub fn read(log: &[u8], at: usize, guid: &Guid) -> Option<Self> {
        let length = Self::claimed_length(log, at, guid)?;
        let bytes = of_ring(log, at, length);
        if bytes.len() != length || !crc::is_right(&bytes) {
            return None;
        }
        let (tail, sequence, count) = (u32_at(&bytes, 12) as usize, u64_at(&bytes, 16), u32_at(&bytes, 24) as usize);
        let front =
            HEADER_BYTES.checked_add(count.checked_mul(DESCRIPTOR_BYTES)?)?.checked_next_multiple_of(LOG_SECTOR)?;
        if sequence == 0 || !tail.is_multiple_of(LOG_SECTOR) || tail >= log.len() || front > length {
            return None;
        }
        let mut sectors = bytes.get(front..)?.chunks_exact(LOG_SECTOR);
        let descriptors = bytes.get(HEADER_BYTES..HEADER_BYTES + count * DESCRIPTOR_BYTES)?;
        let mut updates = Vec::new();
        for descriptor in descriptors.chunks_exact(DESCRIPTOR_BYTES) {
            let offset = u64_at(descriptor, 16);
            if u64_at(descriptor, 24) != sequence || !offset.is_multiple_of(LOG_SECTOR as u64) {
                return None;
            }
            updates.push(match descriptor.first_chunk() {
                Some(&ZERO) => {
                    let length = u64_at(descriptor, 8);
                    Update::Zero(
                        offset..offset.checked_add(length).filter(|_| length.is_multiple_of(LOG_SECTOR as u64))?,
                    )
                }
                Some(&DESC) => Update::Page { offset, bytes: data_sector(sectors.next()?, descriptor, sequence)? },
                _ => return None,
            });
        }
        let (flushed_file, last_file) = (u64_at(&bytes, 48), u64_at(&bytes, 56));
        Some(Self { at, length, tail, sequence, flushed_file, last_file, updates })
    }
}

/// The page that a data sector makes, with what its descriptor has of it.
fn data_sector(sector: &[u8], descriptor: &[u8], sequence: u64) -> Option<Vec<u8>> {
    let number = u64::from(u32_at(sector, 4)) << 32 | u64::from(u32_at(sector, LOG_SECTOR - TRAILING));
    if sector[..4] != DATA || number != sequence {
        return None;
    }
    let mut page = sector.to_vec();
    page[..LEADING].copy_from_slice(descriptor.get(8..8 + LEADING)?);
    page[LOG_SECTOR - TRAILING..].copy_from_slice(descriptor.get(4..4 + TRAILING)?);
    Some(page)
}

/// An entry that is to be written.
#[derive(Clone, Debug)]
pub struct NewEntry<'a> {
    /// Byte offset in the log, which is that of its tail, too: what is before it is in its place.
    pub at: u32,
    /// Greater than that of the entry before it by one.
    pub sequence: u64,
    /// That of the header.
    pub guid: Guid,
    /// Length of the file in bytes, durable: the file is at least as long after any crash.
    pub file_length: u64,
    /// What the entry does: up to [`PAGES_PER_ENTRY`] pages, and a few ranges that become zero.
    pub updates: &'a [Update],
}

impl NewEntry<'_> {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let descriptors = HEADER_BYTES + self.updates.len() * DESCRIPTOR_BYTES;
        let mut bytes = vec![0; descriptors.next_multiple_of(LOG_SECTOR)];
        for (index, update) in self.updates.iter().enumerate() {
            let at = HEADER_BYTES + index * DESCRIPTOR_BYTES;
            put(&mut bytes, at + 24, &self.sequence.to_le_bytes());
            match update {
                Update::Zero(range) => {
                    put(&mut bytes, at, &ZERO);
                    put(&mut bytes, at + 8, &range.end.saturating_sub(range.start).to_le_bytes());
                    put(&mut bytes, at + 16, &range.start.to_le_bytes());
                }
                Update::Page { offset, bytes: page } => {
                    put(&mut bytes, at, &DESC);
                    put(&mut bytes, at + 4, page.get(LOG_SECTOR - TRAILING..).unwrap_or_default());
                    put(&mut bytes, at + 8, page.get(..LEADING).unwrap_or_default());
                    put(&mut bytes, at + 16, &offset.to_le_bytes());
                    let sector = bytes.len();
                    bytes.extend_from_slice(page);
                    put(&mut bytes, sector, &DATA);
                    let [a, b, c, d, high @ ..] = self.sequence.to_le_bytes();
                    put(&mut bytes, sector + 4, &high);
                    put(&mut bytes, sector + LOG_SECTOR - TRAILING, &[a, b, c, d]);
                }
            }
        }
        put(&mut bytes, 0, &LOGE);
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        put(&mut bytes, 8, &length.to_le_bytes());
        put(&mut bytes, 12, &self.at.to_le_bytes());
        put(&mut bytes, 16, &self.sequence.to_le_bytes());
        put(&mut bytes, 24, &u32::try_from(self.updates.len()).unwrap_or(u32::MAX).to_le_bytes());
        put(&mut bytes, 32, &self.guid.0);
        put(&mut bytes, 48, &self.file_length.to_le_bytes());
        put(&mut bytes, 56, &self.file_length.to_le_bytes());
        crc::seal(&mut bytes);
        bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GUID: Guid = Guid([3; 16]);

    fn page(offset: u64, seed: u8) -> Update {
        let bytes = (0..LOG_SECTOR).map(|at| (at % 251).to_le_bytes()[0] ^ seed).collect();
        Update::Page { offset, bytes }
    }

    fn updates(pages: u64) -> Vec<Update> {
        let mut updates: Vec<Update> = (0..pages).map(|n| page(n * 4096, n.to_le_bytes()[0])).collect();
        updates.insert(1, Update::Zero(1 << 20..(1 << 20) + 8192));
        updates
    }

    fn entry(updates: &[Update]) -> Vec<u8> {
        NewEntry { at: 8192, sequence: 0x1_0000_0007, guid: GUID, file_length: 9 << 20, updates }.encode()
    }

    fn ring(entry: &[u8]) -> Vec<u8> {
        let mut log = vec![0xee; 1 << 20];
        log[8192..8192 + entry.len()].copy_from_slice(entry);
        log
    }

    #[test]
    fn what_is_made_is_read() {
        for pages in [1, 5, 120, 140] {
            let updates = updates(pages);
            let bytes = entry(&updates);
            let read = LogEntry::read(&ring(&bytes), 8192, &GUID).unwrap();
            assert_eq!((read.at, read.tail, read.length), (8192, 8192, bytes.len()));
            assert_eq!((read.sequence, read.flushed_file, read.last_file), (0x1_0000_0007, 9 << 20, 9 << 20));
            assert_eq!(read.updates, updates);
        }
        let empty = entry(&[]);
        assert_eq!(LogEntry::read(&ring(&empty), 8192, &GUID).unwrap().updates, []);
        assert!(entry(&updates(PAGES_PER_ENTRY as u64)).len() <= (1 << 20) / 3);
    }

    #[test]
    fn an_entry_may_go_on_at_the_beginning_of_the_ring() {
        let bytes = entry(&updates(5));
        let mut log = vec![0; 1 << 16];
        let at = log.len() - 3 * LOG_SECTOR;
        log[at..].copy_from_slice(&bytes[..3 * LOG_SECTOR]);
        log[..bytes.len() - 3 * LOG_SECTOR].copy_from_slice(&bytes[3 * LOG_SECTOR..]);
        assert_eq!(LogEntry::read(&log, at, &GUID).unwrap().updates, updates(5));
    }

    #[test]
    fn every_sector_has_to_be_of_the_entry() {
        let bytes = entry(&updates(2));
        assert!(LogEntry::read(&ring(&bytes), 8192, &Guid([4; 16])).is_none());
        assert!(LogEntry::read(&ring(&bytes), 4096, &GUID).is_none());
        // With a checksum that is right nevertheless, and without.
        for (at, value) in
            [(0, 1), (8, 1), (8, 0xff), (11, 0xff), (12, 1), (15, 9), (25, 1), (64, 1), (80, 1), (88, 1), (64 + 33, 1)]
        {
            let mut wrong = bytes.clone();
            wrong[at] ^= value;
            assert!(LogEntry::read(&ring(&wrong), 8192, &GUID).is_none(), "{at}");
            crc::seal(&mut wrong);
            // The first descriptor is of a page: what its bytes 8 to 15 say is data, and stays so.
            let read = LogEntry::read(&ring(&wrong), 8192, &GUID);
            assert!(read.is_none() || read.unwrap().updates != updates(2), "{at}");
        }
        for at in [LOG_SECTOR, LOG_SECTOR + 4, 2 * LOG_SECTOR - 1] {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            crc::seal(&mut wrong);
            assert!(LogEntry::read(&ring(&wrong), 8192, &GUID).is_none(), "{at}");
        }
    }
}
