//! Reads damaged images as far as that is possible, straight from the specifications: sector by sector, and what cannot be
//! read is said to be unreadable. It shares no code with the drivers.

use super::super::Format;

/// Bytes of a sector, the unit in which images are compared.
pub const SECTOR: usize = 512;
/// Longer disks are not compared.
const LONGEST: u64 = 16 << 20;

/// What is known of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The layer holds nothing here.
    Below,
    /// What it holds cannot be read.
    Unreadable,
    /// It holds these bytes.
    Held,
}

/// A disk, or what one layer holds of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Length in bytes.
    pub length: usize,
    /// By sector.
    pub states: Vec<State>,
    /// By byte, in whole sectors; zeroes where nothing is held.
    pub bytes: Vec<u8>,
}

impl Disk {
    fn new(length: u64) -> Option<Self> {
        let length = usize::try_from(length).ok().filter(|&length| length as u64 <= LONGEST)?;
        let sectors = length.div_ceil(SECTOR);
        Some(Self { length, states: vec![State::Below; sectors], bytes: vec![0; sectors * SECTOR] })
    }

    /// Hold `bytes` (or zeroes where there are none) at `at`, as far as the disk goes.
    fn hold(&mut self, at: usize, length: usize, bytes: &[u8]) {
        let end = (at + length).min(self.bytes.len());
        let count = bytes.len().min(end.saturating_sub(at));
        if at < end {
            self.bytes[at..at + count].copy_from_slice(&bytes[..count]);
            self.bytes[at + count..end].fill(0);
            self.states[at / SECTOR..end.div_ceil(SECTOR)].fill(State::Held);
        }
    }

    fn unreadable(&mut self, at: usize, length: usize) {
        let end = (at + length).min(self.bytes.len());
        if at < end {
            self.states[at / SECTOR..end.div_ceil(SECTOR)].fill(State::Unreadable);
        }
    }

    /// The bytes of a sector, if they can be read.
    pub fn sector(&self, number: usize) -> Option<&[u8]> {
        let readable = self.states.get(number) == Some(&State::Held);
        let end = (number * SECTOR + SECTOR).min(self.length);
        readable.then(|| &self.bytes[number * SECTOR..end])
    }
}

/// What a guest sees through these layers, the top-most first.
pub fn seen(layers: &[&Disk]) -> Disk {
    let mut disk = layers[0].clone();
    for number in 0..disk.states.len() {
        let at = number * SECTOR;
        let mut state = State::Held;
        let mut bytes = [0; SECTOR];
        for layer in layers {
            if at >= layer.length {
                break;
            }
            // A layer that ends within the sector hides a part of those below it.
            let cut = at + SECTOR > layer.length && layer.length != disk.length;
            state = if cut { State::Unreadable } else { layer.states[number] };
            match state {
                State::Below => state = State::Held,
                State::Held => {
                    bytes.copy_from_slice(&layer.bytes[at..at + SECTOR]);
                    break;
                }
                State::Unreadable => break,
            }
        }
        disk.states[number] = state;
        disk.bytes[at..at + SECTOR].copy_from_slice(&bytes);
    }
    disk
}

/// What an image holds; `None` if its header makes no sense, or the disk is too long to be compared.
pub fn read(format: Format, bytes: &[u8]) -> Option<Disk> {
    match format {
        Format::Raw => {
            // The last sector of a disk is a whole one.
            let mut disk = Disk::new((bytes.len() as u64).next_multiple_of(SECTOR as u64))?;
            disk.hold(0, disk.length, bytes);
            Some(disk)
        }
        Format::Qcow2 => {
            let image = Qcow2::new(bytes)?;
            image.layer(number(bytes, 24, 8)?, number(bytes, 40, 8)?, number(bytes, 36, 4)?)
        }
        Format::Vmdk => vmdk(bytes),
    }
}

/// What each internal snapshot of a qcow2 image holds.
pub fn snapshots(bytes: &[u8]) -> Vec<Option<Disk>> {
    let Some(image) = Qcow2::new(bytes) else { return Vec::new() };
    let (Some(count), Some(mut at)) = (number(bytes, 60, 4), number(bytes, 64, 8)) else { return Vec::new() };
    let mut found = Vec::new();
    for _ in 0..count.min(64) {
        let field = |offset: u64, width| at.checked_add(offset).and_then(|at| number(bytes, at, width));
        let Some((extra, names)) = field(36, 4).zip(Some(field(12, 2).unwrap_or(0) + field(14, 2).unwrap_or(0))) else {
            break;
        };
        let size = if extra >= 16 { field(48, 8) } else { number(bytes, 24, 8) };
        let place = size.zip(field(0, 8)).zip(field(8, 4));
        found.push(place.and_then(|((size, l1), entries)| image.layer(size, l1, entries)));
        at += (40 + extra + names).next_multiple_of(8);
    }
    found
}

/// A big-endian number of some bytes; `None` past the end of the file.
fn number(bytes: &[u8], at: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let raw = bytes.get(at..at.checked_add(width)?)?;
    Some(raw.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// A little-endian one.
fn little(bytes: &[u8], at: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let raw = bytes.get(at..at.checked_add(width)?)?;
    Some(raw.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// What of a file lies at `at`: fewer bytes at its end.
fn part(bytes: &[u8], at: u64, length: usize) -> &[u8] {
    let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
    &bytes[at..at.saturating_add(length).min(bytes.len())]
}

struct Qcow2<'a> {
    bytes: &'a [u8],
    bits: u32,
    version: u64,
    extended: bool,
    deflate: bool,
}

impl<'a> Qcow2<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let (version, bits) = (number(bytes, 4, 4)?, number(bytes, 20, 4)?);
        let incompatible = if version >= 3 { number(bytes, 72, 8)? } else { 0 };
        let known = bytes.starts_with(b"QFI\xfb") && matches!(version, 2 | 3) && (9..=21).contains(&bits);
        let extended = incompatible & 16 != 0;
        let readable = incompatible & !(1 | 2 | 8 | 16) == 0 && number(bytes, 32, 4)? == 0 && (!extended || bits >= 14);
        let image = Self { bytes, bits: bits as u32, version, extended, deflate: incompatible & 8 == 0 };
        (known && readable).then_some(image)
    }

    /// What an L1 table leads to.
    fn layer(&self, virtual_size: u64, l1: u64, l1_entries: u64) -> Option<Disk> {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let mut disk = Disk::new(virtual_size)?;
        let size = 1u64 << self.bits;
        let width = if self.extended { 16 } else { 8 };
        let per_table = size / width;
        for cluster in 0..virtual_size.div_ceil(size) {
            let at = (cluster * size) as usize;
            let index = cluster / per_table;
            if index >= l1_entries {
                disk.unreadable(at, size as usize);
                continue;
            }
            let table = l1.checked_add(index * 8).and_then(|at| number(self.bytes, at, 8));
            let table = match table.map(|entry| entry & OFFSET) {
                Some(0) => continue,
                Some(table) if table.is_multiple_of(size) => table,
                _ => {
                    disk.unreadable(at, size as usize);
                    continue;
                }
            };
            let place = table + cluster % per_table * width;
            let bitmap = if self.extended { number(self.bytes, place + 8, 8) } else { Some(0) };
            let Some((entry, bitmap)) = number(self.bytes, place, 8).zip(bitmap) else {
                disk.unreadable(at, size as usize);
                continue;
            };
            let host = entry & OFFSET;
            if entry >> 62 & 1 == 1 {
                match self.decoded(entry) {
                    Some(bytes) => disk.hold(at, size as usize, &bytes),
                    None => disk.unreadable(at, size as usize),
                }
            } else if !host.is_multiple_of(size) {
                disk.unreadable(at, size as usize);
            } else if self.extended {
                let bytes = (size / 32) as usize;
                for sub in 0..32 {
                    let (start, data) = (at + sub * bytes, part(self.bytes, host + (sub * bytes) as u64, bytes));
                    match (bitmap >> sub & 1, bitmap >> (32 + sub) & 1) {
                        (1, 1) => disk.unreadable(start, bytes),
                        (1, 0) if host == 0 => disk.unreadable(start, bytes),
                        (1, 0) => disk.hold(start, bytes, data),
                        (0, 1) => disk.hold(start, bytes, &[]),
                        _ => {}
                    }
                }
            } else if entry & 1 == 1 && self.version >= 3 {
                disk.hold(at, size as usize, &[]);
            } else if host != 0 {
                disk.hold(at, size as usize, part(self.bytes, host, size as usize));
            }
        }
        Some(disk)
    }

    /// A compressed cluster; `None` if it does not decode to a whole one.
    fn decoded(&self, entry: u64) -> Option<Vec<u8>> {
        let x = 62 - (self.bits - 8);
        let start = entry & ((1 << x) - 1);
        let sectors = (entry & ((1 << 62) - 1)) >> x;
        let end = (start / 512 + sectors + 1) * 512;
        let stream = part(self.bytes, start, usize::try_from(end - start).ok()?);
        let size = 1usize << self.bits;
        self.deflate.then(|| inflate(stream, size, 0)).flatten()
    }
}

/// The first `size` bytes of what a stream decodes to.
fn inflate(stream: &[u8], size: usize, flags: u32) -> Option<Vec<u8>> {
    use miniz_oxide::inflate::core::{decompress, inflate_flags, DecompressorOxide};
    let mut bytes = vec![0; size];
    let flags = flags | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, written) = decompress(&mut DecompressorOxide::new(), stream, &mut bytes, 0, flags);
    (written == size).then_some(bytes)
}

fn vmdk(bytes: &[u8]) -> Option<Disk> {
    use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_PARSE_ZLIB_HEADER;
    let mut base = 0;
    if little(bytes, 56, 8)? == u64::MAX {
        base = (bytes.len() as u64).checked_sub(1024)?;
    }
    let flags = little(bytes, base + 8, 4)?;
    let grain = little(bytes, base + 20, 8)?.checked_mul(512).filter(|&grain| grain > 0 && grain <= LONGEST)? as usize;
    let length = little(bytes, base + 12, 8)?.checked_mul(512)?;
    let directory = little(bytes, base + 56, 8)?.checked_mul(512)?;
    if !bytes.starts_with(b"KDMV") || little(bytes, base + 44, 4)? != 512 {
        return None;
    }
    let mut disk = Disk::new(length)?;
    for number in 0..disk.length.div_ceil(grain) as u64 {
        let at = number as usize * grain;
        let table = directory.checked_add(number / 512 * 4).and_then(|at| little(bytes, at, 4));
        let entry = match table {
            Some(0) => Some(0),
            Some(table) => little(bytes, table * 512 + number % 512 * 4, 4),
            None => None,
        };
        match entry {
            Some(0) => {}
            Some(1) if flags & 4 != 0 => disk.hold(at, grain, &[]),
            Some(sector) if flags & (1 << 16) != 0 => {
                let stream =
                    little(bytes, sector * 512 + 8, 4).map(|length| part(bytes, sector * 512 + 12, length as usize));
                let rest = grain.min(disk.length - at);
                match stream.and_then(|stream| {
                    inflate(stream, rest, TINFL_FLAG_PARSE_ZLIB_HEADER)
                        .or_else(|| inflate(stream, grain, TINFL_FLAG_PARSE_ZLIB_HEADER))
                }) {
                    Some(bytes) => disk.hold(at, grain, &bytes),
                    None => disk.unreadable(at, grain),
                }
            }
            Some(sector) => disk.hold(at, grain, part(bytes, sector * 512, grain)),
            None => disk.unreadable(at, grain),
        }
    }
    Some(disk)
}
