//! What an image says, from its bytes.

use crate::bytes::{be32, be64, checksum};
use crate::{Kind, SECTOR};
use instar_testkit::padded;

/// An image that is read.
#[derive(Debug)]
pub struct View<'a> {
    /// The file.
    pub bytes: &'a [u8],
    /// Its kind.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: usize,
    /// Bytes of a block; 0 for a fixed disk.
    pub block: usize,
    /// Byte offsets of the footer that counts, and of the header.
    footer: usize,
    header: usize,
    /// Byte offset of the table, and its entries.
    pub table: (usize, Vec<usize>),
}

/// Whether there is a footer at byte `at`.
pub fn has_footer(bytes: &[u8], at: usize) -> bool {
    let Some(footer) = bytes.get(at..at + SECTOR) else { return false };
    &footer[..8] == b"conectix" && be32(footer, 64) == checksum(footer, 64) as usize
}

impl<'a> View<'a> {
    /// Read footer, header and table: the copy in front counts. Panics if the bytes are no image.
    pub fn new(bytes: &'a [u8]) -> Self {
        let end = bytes.len() - SECTOR;
        Self::of_footer(bytes, if has_footer(bytes, 0) && be32(bytes, 60) != 2 { 0 } else { end })
    }

    /// What blktap reads: the footer at the end counts, if there is one.
    pub fn by_tail(bytes: &'a [u8]) -> Self {
        let end = bytes.len() - SECTOR;
        Self::of_footer(bytes, if has_footer(bytes, end) { end } else { 0 })
    }

    fn of_footer(bytes: &'a [u8], at: usize) -> Self {
        assert!(has_footer(bytes, at), "no footer");
        let kind = match be32(bytes, at + 60) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => panic!("type {other}"),
        };
        let size = be64(bytes, at + 48) as usize;
        if kind == Kind::Fixed {
            return Self { bytes, kind, size, block: 0, footer: at, header: 0, table: (0, Vec::new()) };
        }
        let header = be64(bytes, at + 16) as usize;
        assert_eq!(&bytes[header..header + 8], b"cxsparse");
        assert_eq!(be32(bytes, header + 36), checksum(&bytes[header..header + 1024], 36) as usize, "header");
        let (block, table) = (be32(bytes, header + 32), be64(bytes, header + 16) as usize);
        assert!(be32(bytes, header + 28) >= size.div_ceil(block), "too few entries");
        let entries = (0..size.div_ceil(block)).map(|block| be32(bytes, table + block * 4)).collect();
        Self { bytes, kind, size, block, footer: at, header, table: (table, entries) }
    }

    /// Bytes of a block's bitmap.
    pub fn bitmap_bytes(&self) -> usize {
        (self.block / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
    }

    /// The blocks that are there: number and byte offset.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let there = self.table.1.iter().enumerate().filter(|(_, entry)| **entry != 0xffff_ffff);
        there.map(|(block, entry)| (block, entry * SECTOR))
    }

    /// How many blocks it holds.
    pub fn held(&self) -> usize {
        self.blocks().count()
    }

    /// What a guest reads, over the bytes that are below.
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        if self.kind == Kind::Fixed {
            return self.bytes[..self.size].to_vec();
        }
        let mut content = padded(below, self.size);
        for (block, at) in self.blocks() {
            let start = block * self.block;
            let data = at + self.bitmap_bytes();
            for within in 0..(self.size - start).min(self.block) / SECTOR {
                if self.bytes[at + within / 8] & (0x80 >> (within % 8)) != 0 {
                    let to = start + within * SECTOR;
                    content[to..to + SECTOR].copy_from_slice(&self.bytes[data + within * SECTOR..][..SECTOR]);
                }
            }
        }
        content
    }

    /// The parent's unique ID, and its names: that in the header, and what all locators together say, with slashes.
    pub fn parent(&self) -> Option<([u8; 16], Vec<String>)> {
        if self.kind != Kind::Differencing {
            return None;
        }
        let (bytes, at) = (self.bytes, self.header);
        let utf16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
            let units = bytes.chunks(2).map(|pair| unit([pair[0], pair[1]])).take_while(|&unit| unit != 0);
            String::from_utf16_lossy(&units.collect::<Vec<_>>())
        };
        let mut names = vec![utf16(&bytes[at + 64..at + 576], u16::from_be_bytes)];
        for locator in (0..8).map(|index| at + 576 + index * 24).filter(|at| be32(bytes, *at) != 0) {
            let place = be64(bytes, locator + 16) as usize;
            let text = &bytes[place..place + be32(bytes, locator + 8)];
            let name = match &bytes[locator..locator + 4] {
                b"MacX" => String::from_utf8(text.to_vec()).unwrap().replace("file://", "").replace("%20", " "),
                _ => utf16(text, u16::from_le_bytes).replace('\\', "/"),
            };
            let name = name.strip_prefix("./").map_or(name.clone(), str::to_owned);
            if !names[1..].contains(&name) {
                names.push(name);
            }
        }
        Some((bytes[at + 40..at + 56].try_into().unwrap(), names))
    }

    /// The byte offset of the batmap's header, the map, and whether its checksum is right; if it has one.
    pub fn batmap(&self) -> Option<(usize, &[u8], bool)> {
        if self.kind == Kind::Fixed || &self.bytes[self.footer + 28..self.footer + 32] != b"tap\0" {
            return None;
        }
        let at = self.table.0 + (be32(self.bytes, self.header + 28) * 4).next_multiple_of(SECTOR);
        if self.bytes.get(at..at + 8) != Some(b"tdbatmap") {
            return None;
        }
        // One of a version that nobody knows is none.
        if be32(self.bytes, at + 20) > 0x10002 {
            return None;
        }
        let offset = be64(self.bytes, at + 8) as usize;
        let counted = (self.size / self.block / 8).div_ceil(SECTOR).max(1) * SECTOR;
        let map = &self.bytes[offset..offset + counted];
        let sum: u32 = map.iter().map(|&byte| u32::from(byte)).sum();
        Some((at, map, be32(self.bytes, at + 24) == !sum as usize))
    }

    /// Why the image is not consistent: lost space does not count, nor does a footer at the end that is missing.
    pub fn fault(&self) -> Option<String> {
        if self.kind == Kind::Fixed {
            return None;
        }
        let header = self.header;
        let entries = (be32(self.bytes, header + 28) * 4).next_multiple_of(SECTOR);
        let mut used = vec![(0, SECTOR, 0), (header, 1024, 1), (self.table.0, entries, 2)];
        let mut end = self.bytes.len();
        if has_footer(self.bytes, end - SECTOR) {
            end -= SECTOR;
        }
        if let Some((at, map, _)) = self.batmap() {
            used.push((at, SECTOR + map.len(), 3));
        }
        for locator in (0..8).map(|index| header + 576 + index * 24).filter(|at| be32(self.bytes, *at) != 0) {
            used.push((be64(self.bytes, locator + 16) as usize, be32(self.bytes, locator + 8), 4));
        }
        used.extend(self.blocks().map(|(_, at)| (at, self.bitmap_bytes() + self.block, 5)));
        used.sort_unstable();
        if let Some(pair) = used.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            return Some(format!("{pair:?} overlap"));
        }
        if let Some(last) = used.last().filter(|last| last.0 + last.1 > end) {
            return Some(format!("{last:?} goes past the end at {end}"));
        }
        // A map whose checksum is wrong is believed by nobody.
        if let Some((_, map, true)) = self.batmap() {
            for (block, at) in self.blocks().filter(|(block, _)| map[block / 8] & (0x80 >> (block % 8)) != 0) {
                let sectors = (self.size - block * self.block).min(self.block) / SECTOR;
                let full = (0..sectors).all(|within| self.bytes[at + within / 8] & (0x80 >> (within % 8)) != 0);
                if !full {
                    return Some(format!("the batmap says that block {block} is full"));
                }
            }
        }
        None
    }

    /// The file ends with a footer that is the same as its copy in front.
    pub fn is_whole(&self) -> bool {
        let end = self.bytes.len() - SECTOR;
        self.kind == Kind::Fixed || (has_footer(self.bytes, end) && self.bytes[end..] == self.bytes[..SECTOR])
    }
}
