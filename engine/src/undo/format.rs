//! The undo log of a file: its bytes before they were changed in place.
//!
//! All numbers are little-endian. A header of [`HEADER`] bytes:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 16 | [`MAGIC`] |
//! | 16 | 4 | version: 1 |
//! | 20 | 4 | bytes of the name |
//! | 24 | 16 | a unique number, which every record repeats, so that remains of an older log in the same blocks do not count as records |
//! | 40 | 8 | length of the file before the first change, in bytes |
//! | 48 | 8 | its inode |
//! | 56 | 8 | its device, for people: it is another one after a restart |
//! | 64 | 8, 4 | when the file was made: seconds and nanoseconds; 0 where the file system does not say |
//! | 76 | 8 | records that were durable when the log got its name |
//! | 84 | 255 | its name, without directory; of a device, what the system called it |
//! | 340 | 32 | of a block device: SHA-256 of what tells it from every other; zeroes for a file |
//! | 372 | 8, 4 | when it was written before: seconds and nanoseconds; 0 for a device |
//! | 384 | 8, 4 | when the log was begun |
//! | 396 | 4 | [sources](super::Source) of the commit |
//! | 512 | 32 × 4 | CRC-32C of [samples](sample) of it |
//! | 4092 | 4 | CRC-32C of the bytes before |
//!
//! Then two [beats](Beat) of [`RECORD`] bytes, of which the newer counts: when the writing process was alive. They are written in turn, so
//! that one of them is whole. The [sources](super::Source) follow, and then, [behind them](Header::first), the first record.
//!
//! Records follow, each of [`RECORD`] bytes and, if it is of data, the data, filled up to a multiple of as many:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | [`RECORD_MAGIC`] |
//! | 8 | 16 | the log's number |
//! | 24 | 8 | its sequence number, from 0 |
//! | 32 | 8 | that of the first record that was made durable together with it |
//! | 40 | 8, 8 | the range of the file: offset and length in bytes |
//! | 56 | 4 | 1: data follows; 2: the range was a hole |
//! | 60 | 4 | CRC-32C of the data |
//! | 508 | 4 | CRC-32C of the bytes before |

use crc32c::crc32c;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::ops::Range;

/// Bytes of the header.
pub const HEADER: usize = 4096;
/// Where the two beats stand.
pub const BEATS: [u64; 2] = [HEADER as u64, (HEADER + RECORD) as u64];
/// Where the first source stands.
pub const FIRST: u64 = 2 * HEADER as u64;
/// Samples of a file.
pub const SAMPLES: usize = 32;
/// Bytes of a sample.
pub const SAMPLE: u64 = 4096;
/// Bytes of a source.
pub const SOURCE: usize = 4096;
/// Bytes of a record without its data.
pub const RECORD: usize = 512;
/// Bytes of data of one record, at most.
pub const MOST_DATA: u64 = 1 << 20;
/// The first bytes of a log.
pub const MAGIC: &[u8; 16] = b"instar undo log\n";
/// The first bytes of a record.
pub const RECORD_MAGIC: &[u8; 8] = b"undo rec";
/// The first bytes of a beat.
const BEAT_MAGIC: &[u8; 8] = b"undo now";

const VERSION: u32 = 1;
const MOST_NAME: usize = 255;
/// Sources of a commit at most.
const MOST_SOURCES: u32 = 1 << 16;
const DATA: u32 = 1;
const HOLE: u32 = 2;

/// The file of a log, and its state before the first change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// A unique number.
    pub nonce: [u8; 16],
    /// Length of the file before the first change, in bytes.
    pub length: u64,
    /// Its inode.
    pub inode: u64,
    /// The device that it was on.
    pub device: u64,
    /// Its time of creation: seconds and nanoseconds.
    pub born: (u64, u32),
    /// Records that were durable when the log got its name.
    pub durable: u64,
    /// Its name, without directory.
    pub name: Vec<u8>,
    /// What a block device is.
    pub subject: [u8; 32],
    /// When the file was written before: seconds and nanoseconds.
    pub changed: (u64, u32),
    /// When the log was begun.
    pub begun: (u64, u32),
    /// How many images and files the commit takes data from.
    pub sources: u32,
    /// The checksums of its samples.
    pub samples: [u32; SAMPLES],
}

/// A moment in which the process that changes the file was alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// The newer one has the larger number.
    pub number: u64,
    /// Seconds and nanoseconds.
    pub time: (u64, u32),
}

/// The range of a sample of a file of `length` bytes: the first and the last block are samples, and those between lie far from each
/// other. Empty if the file has fewer.
#[must_use]
pub fn sample(index: usize, length: u64) -> Range<u64> {
    let last = length.saturating_sub(1) / SAMPLE;
    let step = last.div_ceil(SAMPLES as u64 - 1).max(1);
    let start = (index as u64).saturating_mul(step).min(last).saturating_mul(SAMPLE);
    let before = (index as u64).saturating_sub(1).saturating_mul(step) >= last && index > 0;
    if before {
        return length..length;
    }
    start..start.saturating_add(SAMPLE).min(length)
}

/// The old content of a range of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// These bytes, of this checksum, which follow the record.
    Data(u32),
    /// A hole.
    Hole,
}

/// A range of the file before its change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number in the log, from 0.
    pub sequence: u64,
    /// That of the first record that was made durable together with it.
    pub batch: u64,
    /// The range in bytes.
    pub offset: u64,
    /// At least one.
    pub length: u64,
    /// Its old content.
    pub kind: Kind,
}

pub(super) fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = block.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

pub(super) fn number(block: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?))
}

pub(super) fn word(block: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(block.get(at..at + 4)?.try_into().ok()?))
}

/// Give a block the checksum of what is before its last four bytes.
pub(super) fn seal(block: &mut [u8]) {
    let end = block.len() - 4;
    let sum = crc32c(&block[..end]).to_le_bytes();
    put(block, end, &sum);
}

pub(super) fn is_sealed(block: &[u8]) -> bool {
    let end = block.len().saturating_sub(4);
    word(block, end) == Some(crc32c(&block[..end]))
}

impl Header {
    /// Where the first record stands.
    #[must_use]
    pub fn first(&self) -> u64 {
        FIRST + u64::from(self.sources) * SOURCE as u64
    }

    /// Encode the header; `None` for a name that no file can have.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let named = u32::try_from(self.name.len()).ok().filter(|_| (1..=MOST_NAME).contains(&self.name.len()))?;
        let mut block = vec![0; HEADER];
        put(&mut block, 0, MAGIC);
        put(&mut block, 16, &VERSION.to_le_bytes());
        put(&mut block, 20, &named.to_le_bytes());
        put(&mut block, 24, &self.nonce);
        put(&mut block, 40, &self.length.to_le_bytes());
        put(&mut block, 48, &self.inode.to_le_bytes());
        put(&mut block, 56, &self.device.to_le_bytes());
        put(&mut block, 64, &self.born.0.to_le_bytes());
        put(&mut block, 72, &self.born.1.to_le_bytes());
        put(&mut block, 76, &self.durable.to_le_bytes());
        put(&mut block, 84, &self.name);
        put(&mut block, 340, &self.subject);
        put(&mut block, 372, &self.changed.0.to_le_bytes());
        put(&mut block, 380, &self.changed.1.to_le_bytes());
        put(&mut block, 384, &self.begun.0.to_le_bytes());
        put(&mut block, 392, &self.begun.1.to_le_bytes());
        put(&mut block, 396, &self.sources.to_le_bytes());
        for (index, sum) in self.samples.iter().enumerate() {
            put(&mut block, 512 + 4 * index, &sum.to_le_bytes());
        }
        seal(&mut block);
        Some(block)
    }

    /// Decode these [`HEADER`] bytes.
    ///
    /// # Errors
    /// Why they are no header, in one clause.
    pub fn decode(block: &[u8]) -> Result<Self, &'static str> {
        if block.len() != HEADER || block.get(..16) != Some(MAGIC) {
            return Err("it does not begin as an undo log does");
        }
        if !is_sealed(block) {
            return Err("the checksum of its header is wrong");
        }
        if word(block, 16) != Some(VERSION) {
            return Err("a newer version of this program wrote it");
        }
        Self::fields(block).filter(|header| i64::try_from(header.length).is_ok()).ok_or("its header makes no sense")
    }

    fn fields(block: &[u8]) -> Option<Self> {
        let named = usize::try_from(word(block, 20)?).ok().filter(|named| (1..=MOST_NAME).contains(named))?;
        let mut samples = [0; SAMPLES];
        for (index, sum) in samples.iter_mut().enumerate() {
            *sum = word(block, 512 + 4 * index)?;
        }
        Some(Self {
            nonce: block.get(24..40)?.try_into().ok()?,
            length: number(block, 40)?,
            inode: number(block, 48)?,
            device: number(block, 56)?,
            born: (number(block, 64)?, word(block, 72)?),
            durable: number(block, 76)?,
            name: block.get(84..84 + named)?.to_vec(),
            subject: block.get(340..372)?.try_into().ok()?,
            changed: (number(block, 372)?, word(block, 380)?),
            begun: (number(block, 384)?, word(block, 392)?),
            sources: word(block, 396).filter(|sources| *sources <= MOST_SOURCES)?,
            samples,
        })
    }
}

impl Beat {
    /// Encode the beat for the log with this number.
    #[must_use]
    pub fn encode(&self, nonce: &[u8; 16]) -> Vec<u8> {
        let mut block = vec![0; RECORD];
        put(&mut block, 0, BEAT_MAGIC);
        put(&mut block, 8, nonce);
        put(&mut block, 24, &self.number.to_le_bytes());
        put(&mut block, 32, &self.time.0.to_le_bytes());
        put(&mut block, 40, &self.time.1.to_le_bytes());
        seal(&mut block);
        block
    }

    /// Decode these [`RECORD`] bytes, if they are a beat of the log with this number.
    #[must_use]
    pub fn decode(block: &[u8], nonce: &[u8; 16]) -> Option<Self> {
        let ours = block.len() == RECORD && block.get(..8)? == BEAT_MAGIC && block.get(8..24)? == nonce;
        if !ours || !is_sealed(block) {
            return None;
        }
        Some(Self { number: number(block, 24)?, time: (number(block, 32)?, word(block, 40)?) })
    }
}

impl Record {
    /// Encode the record for the log with this number.
    #[must_use]
    pub fn encode(&self, nonce: &[u8; 16]) -> Vec<u8> {
        let (kind, sum) = match self.kind {
            Kind::Data(sum) => (DATA, sum),
            Kind::Hole => (HOLE, 0),
        };
        let mut block = vec![0; RECORD];
        put(&mut block, 0, RECORD_MAGIC);
        put(&mut block, 8, nonce);
        put(&mut block, 24, &self.sequence.to_le_bytes());
        put(&mut block, 32, &self.batch.to_le_bytes());
        put(&mut block, 40, &self.offset.to_le_bytes());
        put(&mut block, 48, &self.length.to_le_bytes());
        put(&mut block, 56, &kind.to_le_bytes());
        put(&mut block, 60, &sum.to_le_bytes());
        seal(&mut block);
        block
    }

    /// Decode these [`RECORD`] bytes, if they are a record of the log with this number, for a range within a file of `within`
    /// bytes.
    #[must_use]
    pub fn decode(block: &[u8], nonce: &[u8; 16], within: u64) -> Option<Self> {
        let ours = block.len() == RECORD && block.get(..8)? == RECORD_MAGIC && block.get(8..24)? == nonce;
        if !ours || !is_sealed(block) {
            return None;
        }
        let kind = match (word(block, 56)?, word(block, 60)?) {
            (DATA, sum) => Kind::Data(sum),
            (HOLE, _) => Kind::Hole,
            _ => return None,
        };
        let (offset, length) = (number(block, 40)?, number(block, 48)?);
        let fits = length > 0 && offset.checked_add(length)? <= within;
        let record = Self { sequence: number(block, 24)?, batch: number(block, 32)?, offset, length, kind };
        (fits && record.batch <= record.sequence && (kind == Kind::Hole || length <= MOST_DATA)).then_some(record)
    }

    /// The range of the file.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length)
    }

    /// Bytes of the log that its data takes.
    #[must_use]
    pub fn room(&self) -> u64 {
        match self.kind {
            Kind::Data(_) => self.length.next_multiple_of(RECORD as u64),
            Kind::Hole => 0,
        }
    }
}

/// A number that no other log has.
#[must_use]
pub fn nonce() -> [u8; 16] {
    let draw = || RandomState::new().hash_one(std::process::id()).to_le_bytes();
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&draw());
    nonce[8..].copy_from_slice(&draw());
    nonce
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
