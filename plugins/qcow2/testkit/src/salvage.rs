//! Reads damaged images as far as that is possible, straight from the specification. It shares no code with the driver.

use instar_testkit::{part, Disk};

/// What an image holds; `None` if its header makes no sense, or the disk is too long to be compared.
pub fn salvage(bytes: &[u8]) -> Option<Disk> {
    let image = Image::new(bytes)?;
    image.layer(number(bytes, 24, 8)?, number(bytes, 40, 8)?, number(bytes, 36, 4)?)
}

/// What each internal snapshot holds.
pub fn salvage_snapshots(bytes: &[u8]) -> Vec<Option<Disk>> {
    let Some(image) = Image::new(bytes) else { return Vec::new() };
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

struct Image<'a> {
    bytes: &'a [u8],
    bits: u32,
    version: u64,
    extended: bool,
    deflate: bool,
}

impl<'a> Image<'a> {
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
        self.deflate.then(|| inflate(stream, size)).flatten()
    }
}

/// The first `size` bytes of what a stream decodes to.
fn inflate(stream: &[u8], size: usize) -> Option<Vec<u8>> {
    use miniz_oxide::inflate::core::{decompress, inflate_flags, DecompressorOxide};
    let mut bytes = vec![0; size];
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, written) = decompress(&mut DecompressorOxide::new(), stream, &mut bytes, 0, flags);
    (written == size).then_some(bytes)
}
