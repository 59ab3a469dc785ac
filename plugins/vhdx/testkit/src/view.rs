//! What an image says, from its bytes.

use crate::bytes::{crc32c, le16, le32, le64};
use crate::log::replayed;
use crate::spec::{BAT, METADATA};
use crate::{Kind, MIB};
use instar_testkit::padded;
use std::borrow::Cow;
use std::ops::Range;

/// An image that is read.
#[derive(Debug)]
pub struct View<'a> {
    /// The file, with its log applied.
    pub bytes: Cow<'a, [u8]>,
    /// Its kind.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: usize,
    /// Bytes of a block.
    pub block: usize,
    /// Bytes of a logical sector.
    pub sector: usize,
    /// Byte offset of the header that counts.
    pub header: usize,
    /// Both headers are valid.
    pub both: bool,
    /// Byte offset of the table, and its entries.
    pub table: (usize, Vec<u64>),
    /// Byte offset of the metadata region.
    pub metadata: usize,
    /// Byte offset and length of the parent locator.
    pub locator: Option<(usize, usize)>,
}

/// The number of a valid header at a byte.
fn sequence(bytes: &[u8], at: usize) -> Option<u64> {
    let header = bytes.get(at..at + 4096)?;
    let valid = &header[..4] == b"head" && le32(header, 4) == crc32c(header) as usize;
    valid.then(|| le64(header, 8))
}

impl<'a> View<'a> {
    /// Read an image; an error says what makes it none.
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        if bytes.len() < MIB {
            return Err("no header section".into());
        }
        let numbers = [64 << 10, 128 << 10].map(|at| sequence(bytes, at));
        let header = match numbers {
            [None, None] => return Err("no header".into()),
            [first, second] if first > second => 64 << 10,
            _ => 128 << 10,
        };
        let (log, length) = (le64(bytes, header + 72) as usize, le32(bytes, header + 68));
        let guid = &bytes[header + 48..header + 64];
        let bytes =
            if guid == [0; 16] { Cow::Borrowed(bytes) } else { Cow::Owned(replayed(bytes, log, length, guid)?) };
        let table = [192 << 10, 256 << 10].into_iter().find(|&at| {
            let table = &bytes[at..at + 65536];
            &table[..4] == b"regi" && le32(table, 4) == crc32c(table) as usize
        });
        let table = table.ok_or("no region table")?;
        let region = |guid: [u8; 16]| {
            let mut entries = (0..le32(&bytes, table + 8).min(2047)).map(|index| table + 16 + index * 32);
            entries.find(|at| bytes.get(*at..at + 16) == Some(&guid)).map(|at| le64(&bytes, at + 16) as usize)
        };
        let metadata = region(METADATA).filter(|at| *at < bytes.len()).ok_or("no metadata")?;
        let item = |first: u8| {
            let mut entries = (0..le16(&bytes, metadata + 10)).map(|index| metadata + 32 + index * 32);
            entries
                .find(|at| bytes.get(*at) == Some(&first))
                .map(|at| (metadata + le32(&bytes, at + 16), le32(&bytes, at + 20)))
        };
        let parameters = item(0x37).ok_or("no file parameters")?.0;
        let (block, flags) = (le32(&bytes, parameters), le32(&bytes, parameters + 4));
        let size = le64(&bytes, item(0x24).ok_or("no size")?.0) as usize;
        let sector = le32(&bytes, item(0x1d).ok_or("no sector")?.0);
        let known = [512, 4096].contains(&sector) && block.is_power_of_two() && (MIB..=256 * MIB).contains(&block);
        if !known || size == 0 || size > 64 << 30 {
            return Err(format!("{size} bytes in blocks of {block} and sectors of {sector}"));
        }
        let kind = match flags {
            0 => Kind::Dynamic,
            1 => Kind::Fixed,
            _ => Kind::Differencing,
        };
        let locator = item(0x2d).filter(|_| kind == Kind::Differencing);
        let place = region(BAT).filter(|at| *at < bytes.len()).ok_or("no table")?;
        let (ratio, blocks) = ((1 << 23) * sector / block, size.div_ceil(block));
        let count = match kind {
            Kind::Differencing => blocks.div_ceil(ratio) * (ratio + 1),
            _ => blocks + (blocks - 1) / ratio,
        };
        let entries = (0..count).map(|index| le64(&bytes, place + index * 8)).collect();
        let both = numbers.iter().all(Option::is_some);
        Ok(Self { bytes, kind, size, block, sector, header, both, table: (place, entries), metadata, locator })
    }

    /// The same. Panics if the bytes are no image.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self::read(bytes).unwrap()
    }

    /// Blocks for each sector bitmap block.
    pub fn ratio(&self) -> usize {
        (1 << 23) * self.sector / self.block
    }

    /// The blocks that the table speaks of: number, state and byte offset.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, u64, usize)> + '_ {
        let entry = |block: usize| self.table.1[block + block / self.ratio()];
        let all = (0..self.size.div_ceil(self.block)).map(move |block| (block, entry(block)));
        all.map(|(block, entry)| (block, entry & 7, (entry >> 20 << 20) as usize)).filter(|(_, state, _)| *state != 0)
    }

    /// How many blocks it holds.
    pub fn held(&self) -> usize {
        self.blocks().count()
    }

    /// Byte offset of the sector bitmap block of a block.
    fn bitmap(&self, block: usize) -> Option<usize> {
        let slot = block / self.ratio() * (self.ratio() + 1) + self.ratio();
        let entry = self.table.1.get(slot).copied().filter(|entry| entry & 7 == 6)?;
        Some((entry >> 20 << 20) as usize)
    }

    /// What a guest reads, over the bytes that are below: without a parent there are none.
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        let mut content = padded(below, self.size);
        for (block, state, at) in self.blocks() {
            let start = block * self.block;
            let end = (start + self.block).min(self.size);
            match state {
                1..=3 => content[start..end].fill(0),
                6 => content[start..end].copy_from_slice(&self.bytes[at..at + end - start]),
                _ => {
                    let per_block = self.block / self.sector;
                    let bits = self.bitmap(block).expect("a bitmap") + block % self.ratio() * per_block / 8;
                    for within in 0..(end - start) / self.sector {
                        if self.bytes[bits + within / 8] >> (within % 8) & 1 == 1 {
                            let (to, from) = (start + within * self.sector, at + within * self.sector);
                            content[to..to + self.sector].copy_from_slice(&self.bytes[from..from + self.sector]);
                        }
                    }
                }
            }
        }
        content
    }

    /// Why the image is not consistent: lost space does not count.
    pub fn fault(&self) -> Option<String> {
        let end_of = |(at, length, _): (usize, usize, &str)| at.saturating_add(length);
        let header = self.header;
        let mut used =
            vec![(0, MIB, "headers"), (le64(&self.bytes, header + 72) as usize, le32(&self.bytes, header + 68), "log")];
        used.extend([(self.metadata, MIB, "metadata"), (self.table.0, MIB, "table")]);
        for (index, entry) in self.table.1.iter().enumerate() {
            let (state, at) = (entry & 7, (entry >> 20 << 20) as usize);
            let is_bitmap = index % (self.ratio() + 1) == self.ratio();
            let known = if is_bitmap { [0, 6].contains(&state) } else { ![4, 5].contains(&state) };
            if !known
                || entry & 0xf_fff8 != 0
                || (self.kind != Kind::Differencing && (is_bitmap && state != 0 || state == 7))
            {
                return Some(format!("entry {index} is {entry:#x}"));
            }
            match state {
                6 if is_bitmap => used.push((at, MIB, "bitmap")),
                6 | 7 => used.push((at, self.block, "block")),
                _ => {}
            }
        }
        if let Some((block, ..)) = self.blocks().find(|(block, state, _)| *state == 7 && self.bitmap(*block).is_none())
        {
            return Some(format!("block {block} has no bitmap"));
        }
        used.sort_unstable();
        if let Some(pair) = used.windows(2).find(|pair| end_of(pair[0]) > pair[1].0) {
            return Some(format!("{pair:?} overlap"));
        }
        let end = self.bytes.len();
        used.last().filter(|last| end_of(**last) > end).map(|last| format!("{last:?} goes past the end at {end}"))
    }

    /// Whether the log is to be replayed.
    pub fn is_dirty(&self) -> bool {
        self.bytes[self.header + 48..self.header + 64] != [0; 16]
    }

    /// A GUID of the header: FileWriteGuid, DataWriteGuid, LogGuid.
    pub fn guid(&self, index: usize) -> [u8; 16] {
        self.bytes[self.header + 16 + index * 16..][..16].try_into().unwrap()
    }

    /// Where the value of a key of the parent locator lies in the file, in bytes.
    pub fn place(&self, key: &str) -> Option<Range<usize>> {
        let (at, _) = self.locator?;
        (0..le16(&self.bytes, at + 18)).map(|index| at + 20 + index * 12).find_map(|entry| {
            let range = |place: usize, length: usize| {
                let start = at + le32(&self.bytes, entry + place);
                start..start + le16(&self.bytes, entry + length)
            };
            (self.text(range(0, 8)) == key).then(|| range(4, 10))
        })
    }

    /// The value of a key of the parent locator, as text.
    pub fn value(&self, key: &str) -> Option<String> {
        self.place(key).map(|range| self.text(range))
    }

    fn text(&self, range: Range<usize>) -> String {
        let units: Vec<u16> = self.bytes[range].chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
        String::from_utf16(&units).unwrap()
    }
}
