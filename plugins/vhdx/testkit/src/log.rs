//! The log, from the specification: entries are made, and found and applied.

use crate::bytes::{crc32c, le32, le64, put32, put64, seal};

const SECTOR: usize = 4096;
/// Longest file in bytes that is read: images of tests are shorter, and a damaged log may ask for any length.
const LONGEST: usize = 64 << 20;

/// What an entry does.
#[derive(Clone, Debug)]
pub enum Change {
    /// 4096 bytes at a byte of the file.
    Page(usize, Vec<u8>),
    /// Zeroes from a byte of the file on.
    Zero(usize, usize),
}

/// The pages of `file` that this range touches, as changes that put them there.
pub fn pages(file: &[u8], at: usize, length: usize) -> Vec<Change> {
    let places = (at / SECTOR * SECTOR..at + length).step_by(SECTOR);
    places.map(|place| Change::Page(place, file[place..place + SECTOR].to_vec())).collect()
}

/// The bytes of an entry; `tail` is a byte offset in the log, `lengths` are FlushedFileOffset and LastFileOffset.
pub fn entry(changes: &[Change], sequence: u64, tail: usize, guid: [u8; 16], lengths: [u64; 2]) -> Vec<u8> {
    let mut bytes = vec![0; (64 + changes.len() * 32).next_multiple_of(SECTOR)];
    for (index, change) in changes.iter().enumerate() {
        let at = 64 + index * 32;
        put64(&mut bytes, at + 24, sequence);
        match change {
            Change::Zero(place, length) => {
                bytes[at..at + 4].copy_from_slice(b"zero");
                put64(&mut bytes, at + 8, *length as u64);
                put64(&mut bytes, at + 16, *place as u64);
            }
            Change::Page(place, page) => {
                bytes[at..at + 4].copy_from_slice(b"desc");
                bytes[at + 4..at + 8].copy_from_slice(&page[4092..]);
                bytes[at + 8..at + 16].copy_from_slice(&page[..8]);
                put64(&mut bytes, at + 16, *place as u64);
                let sector = bytes.len();
                bytes.extend(page);
                bytes[sector..sector + 4].copy_from_slice(b"data");
                put32(&mut bytes, sector + 4, (sequence >> 32) as usize);
                put32(&mut bytes, sector + 4092, (sequence & 0xffff_ffff) as usize);
            }
        }
    }
    bytes[..4].copy_from_slice(b"loge");
    let length = bytes.len();
    put32(&mut bytes, 8, length);
    put32(&mut bytes, 12, tail);
    put64(&mut bytes, 16, sequence);
    put32(&mut bytes, 24, changes.len());
    bytes[32..48].copy_from_slice(&guid);
    put64(&mut bytes, 48, lengths[0]);
    put64(&mut bytes, 56, lengths[1]);
    seal(&mut bytes, 0, length);
    bytes
}

/// An entry that was found: its place in the log, its bytes in one piece.
struct Found {
    at: usize,
    bytes: Vec<u8>,
}

impl Found {
    /// The valid entry at a byte of the log.
    fn at(log: &[u8], at: usize, guid: &[u8]) -> Option<Self> {
        let length = le32(log, at + 8);
        let claimed = &log[at..at + 4] == b"loge" && &log[at + 32..at + 48] == guid;
        if !claimed || length < SECTOR || !length.is_multiple_of(SECTOR) || length > log.len() {
            return None;
        }
        let bytes: Vec<u8> = log.iter().cycle().skip(at).take(length).copied().collect();
        let found = Self { at, bytes };
        (le32(&found.bytes, 4) == crc32c(&found.bytes) as usize && found.changes().is_some()).then_some(found)
    }

    fn sequence(&self) -> u64 {
        le64(&self.bytes, 16)
    }

    fn tail(&self) -> usize {
        le32(&self.bytes, 12)
    }

    /// What it does; nothing if a part of it is not its own.
    fn changes(&self) -> Option<Vec<Change>> {
        let (count, sequence) = (le32(&self.bytes, 24), self.sequence());
        let mut sector = (64 + count * 32).next_multiple_of(SECTOR);
        let mut changes = Vec::new();
        for index in 0..count {
            let descriptor = self.bytes.get(64 + index * 32..96 + index * 32)?;
            let place = le64(descriptor, 16) as usize;
            if le64(descriptor, 24) != sequence {
                return None;
            }
            match &descriptor[..4] {
                b"zero" => changes.push(Change::Zero(place, le64(descriptor, 8) as usize)),
                b"desc" => {
                    let mut page = self.bytes.get(sector..sector + SECTOR)?.to_vec();
                    let number = (le32(&page, 4) as u64) << 32 | le32(&page, 4092) as u64;
                    if &page[..4] != b"data" || number != sequence {
                        return None;
                    }
                    page[..8].copy_from_slice(&descriptor[8..16]);
                    page[4092..].copy_from_slice(&descriptor[4..8]);
                    changes.push(Change::Page(place, page));
                    sector += SECTOR;
                }
                _ => return None,
            }
        }
        (sequence > 0).then_some(changes)
    }
}

/// The file with its log applied; an error says what is wrong with the log. `at` and `length` are the log's.
pub fn replayed(bytes: &[u8], at: usize, length: usize, guid: &[u8]) -> Result<Vec<u8>, String> {
    let log =
        bytes.get(at..at.saturating_add(length)).filter(|log| log.len() >= SECTOR && log.len().is_multiple_of(SECTOR));
    let log = log.ok_or("the log is not in the file")?;
    let mut best: Vec<Found> = Vec::new();
    // Every place is tried: what begins within a sequence is a shorter one.
    for tail in (0..length).step_by(SECTOR) {
        let mut run: Vec<Found> = Vec::new();
        let mut next = tail;
        while let Some(found) = Found::at(log, next, guid) {
            let total: usize = run.iter().map(|found| found.bytes.len()).sum();
            let follows = run.last().is_none_or(|last| last.sequence() + 1 == found.sequence());
            if !follows || total + found.bytes.len() > length {
                break;
            }
            next = (next + found.bytes.len()) % length;
            run.push(found);
        }
        let Some(head) = run.last() else { continue };
        let (sequence, start) = (head.sequence(), head.tail());
        let known = best.last().map_or(0, Found::sequence);
        if let Some(first) = run.iter().position(|found| found.at == start) {
            if sequence > known {
                best = run.split_off(first);
            }
        }
    }
    let head = best.last().ok_or("the log holds no sequence")?;
    if (bytes.len() as u64) < le64(&head.bytes, 48) {
        return Err(format!("the file of {} bytes was cut off", bytes.len()));
    }
    let last = le64(&head.bytes, 56) as usize;
    if last > LONGEST {
        return Err(format!("the file would have {last} bytes"));
    }
    let mut file = bytes.to_vec();
    for change in best.iter().flat_map(|found| found.changes().unwrap()) {
        let end = match &change {
            Change::Page(place, _) => place.saturating_add(SECTOR),
            Change::Zero(place, length) => place.saturating_add(*length),
        };
        if end > LONGEST {
            return Err(format!("the log changes byte {end}"));
        }
        let (place, page) = match change {
            Change::Page(place, page) => (place, page),
            Change::Zero(place, length) => (place, vec![0; length]),
        };
        file.resize(file.len().max(place + page.len()), 0);
        file[place..place + page.len()].copy_from_slice(&page);
    }
    file.resize(file.len().max(last), 0);
    Ok(file)
}
