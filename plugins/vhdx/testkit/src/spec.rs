//! Images as tests say them, and their bytes, straight from the specification.

use crate::bytes::{put16, put32, put64, seal};
use crate::log::{entry, pages};
use crate::MIB;

/// GUID of the region of the block allocation table, as it stands in a file.
pub const BAT: [u8; 16] =
    [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08];
/// GUID of the metadata region, as it stands in a file.
pub const METADATA: [u8; 16] =
    [0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e];

/// GUIDs of the metadata items, in the order in which they are written.
const ITEMS: [[u8; 16]; 6] = [
    [0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b],
    [0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8],
    [0xab, 0x12, 0xca, 0xbe, 0xe6, 0xb2, 0x23, 0x45, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46],
    [0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f],
    [0xc7, 0x48, 0xa3, 0xcd, 0x5d, 0x44, 0x71, 0x44, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56],
    [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c],
];
const LOCATOR_TYPE: [u8; 16] =
    [0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13];
const LOG_GUID: [u8; 16] = [0x77; 16];

/// The kind of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All blocks are there, and stay.
    Fixed,
    /// Blocks.
    Dynamic,
    /// Blocks over a parent.
    Differencing,
}

/// What stands in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// Nothing.
    Empty,
    /// All that table, bitmaps, region tables and metadata say; in their places stands something else.
    Pending,
    /// An entry of an earlier session.
    Stale,
}

/// What the locator has besides `parent_linkage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linkage {
    /// No second key.
    Alone,
    /// A second key of zeroes.
    Second,
    /// The same, and either value passes the end of a sector.
    Torn,
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its kind.
    pub kind: Kind,
    /// Bytes of the disk, whole logical sectors.
    pub size: usize,
    /// Bytes of a block.
    pub block: usize,
    /// Bytes of a logical sector.
    pub sector: usize,
    /// Every byte of the DataWriteGuid.
    pub id: u8,
    /// The parent's DataWriteGuid.
    pub parent: [u8; 16],
    /// Runs of logical sectors that the image holds: first, count, and the seed of [`fill`].
    pub runs: Vec<(usize, usize, u8)>,
    /// Blocks in a state that has no data.
    pub states: Vec<(usize, u64)>,
    /// Blocks that are there although no sector of them is.
    pub hollow: Vec<usize>,
    /// Blocks that are all there are so by their bitmap.
    pub by_bitmap: bool,
    /// What the log holds.
    pub log: Log,
    /// The parent's identity.
    pub linkage: Linkage,
    /// The table stands behind the blocks.
    pub table_last: bool,
    /// MiB between one block and the next.
    pub gap: usize,
    /// MiB behind the last block.
    pub tail: usize,
    /// The second header is valid, too.
    pub both: bool,
    /// Bytes that no sector shows: under bits that are 0, in bits that mean nothing, in gaps, behind the end, and in entries
    /// behind the last.
    pub garbage: u8,
}

impl Spec {
    /// An empty image with blocks of 1 MiB and sectors of 512 bytes.
    pub fn new(kind: Kind, size: usize) -> Self {
        Self {
            kind,
            size,
            block: MIB,
            sector: 512,
            id: 5,
            parent: [4; 16],
            runs: Vec::new(),
            states: Vec::new(),
            hollow: Vec::new(),
            by_bitmap: false,
            log: Log::Empty,
            linkage: Linkage::Second,
            table_last: false,
            gap: 0,
            tail: 0,
            both: true,
            garbage: 0,
        }
    }

    /// The same with these runs of sectors besides.
    #[must_use]
    pub fn with(mut self, runs: impl IntoIterator<Item = (usize, usize, u8)>) -> Self {
        self.runs.extend(runs);
        self
    }

    /// Blocks for each sector bitmap block.
    fn ratio(&self) -> usize {
        (1 << 23) * self.sector / self.block
    }
}

/// The bytes of a logical sector of `length` bytes, none of them zero.
pub fn fill(sector: usize, seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| ((at / 7) ^ sector ^ (seed as usize * 37)) as u8 | 1).collect()
}

/// A GUID in braces, in lower case.
pub fn guid_text(guid: [u8; 16]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::from("{");
    for (place, index) in order.into_iter().enumerate() {
        let hyphen = if [4, 6, 8, 10].contains(&place) { "-" } else { "" };
        text += &format!("{hyphen}{:02x}", guid[index]);
    }
    text + "}"
}

fn header(spec: &Spec, sequence: u64, log_guid: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[..4].copy_from_slice(b"head");
    put64(&mut bytes, 8, sequence);
    bytes[16..32].fill(spec.id ^ 0x80);
    bytes[32..48].fill(spec.id);
    bytes[48..64].copy_from_slice(&log_guid);
    put16(&mut bytes, 66, 1);
    put32(&mut bytes, 68, MIB);
    put64(&mut bytes, 72, MIB as u64);
    seal(&mut bytes, 0, 4096);
    bytes
}

/// A parent locator.
fn locator(spec: &Spec) -> Vec<u8> {
    let mut pairs = vec![("parent_linkage", guid_text(spec.parent)), ("relative_path", ".\\base.vhdx".to_owned())];
    if spec.linkage != Linkage::Alone {
        pairs.push(("parent_linkage2", guid_text([0; 16])));
    }
    let mut item = vec![0; 20 + pairs.len() * 12];
    item[..16].copy_from_slice(&LOCATOR_TYPE);
    put16(&mut item, 18, pairs.len());
    for (index, (key, value)) in pairs.iter().enumerate() {
        for (number, text) in [*key, value.as_str()].into_iter().enumerate() {
            let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            if bytes.len() == 76 && spec.linkage == Linkage::Torn {
                item.resize(item.len().next_multiple_of(512) + 480, 0);
            } else if bytes.len() == 76 && item.len() / 512 != (item.len() + 75) / 512 {
                item.resize(item.len().next_multiple_of(512), 0);
            }
            let place = item.len();
            put32(&mut item, 20 + index * 12 + number * 4, place);
            put16(&mut item, 28 + index * 12 + number * 2, bytes.len());
            item.extend(bytes);
        }
    }
    item
}

/// The metadata region.
fn metadata(spec: &Spec) -> Vec<u8> {
    let kind = [1, 0, 2][spec.kind as usize];
    let mut parameters = vec![0; 8];
    put32(&mut parameters, 0, spec.block);
    put32(&mut parameters, 4, kind);
    let number = |value: usize, width: usize| value.to_le_bytes()[..width].to_vec();
    let mut items = vec![
        (parameters, 4),
        (number(spec.size, 8), 6),
        (vec![0x1d; 16], 6),
        (number(spec.sector, 4), 6),
        (number(4096, 4), 6),
    ];
    if spec.kind == Kind::Differencing {
        items.push((locator(spec), 4));
    }
    let mut bytes = vec![0; MIB];
    bytes[..8].copy_from_slice(b"metadata");
    put16(&mut bytes, 10, items.len());
    let mut place = 65536;
    for (index, (item, flags)) in items.iter().enumerate() {
        let at = 32 + index * 32;
        if index == 5 {
            place = 65536 + 4096;
        }
        bytes[at..at + 16].copy_from_slice(&ITEMS[index]);
        put32(&mut bytes, at + 16, place);
        put32(&mut bytes, at + 20, item.len());
        put32(&mut bytes, at + 24, *flags);
        bytes[place..place + item.len()].copy_from_slice(item);
        place += item.len();
    }
    bytes
}

/// What is in the file by the table: the entries, and where sector bitmap blocks are.
struct Body {
    file: Vec<u8>,
    table: Vec<u64>,
    bitmaps: Vec<usize>,
}

impl Body {
    /// Blocks from the last to the first: their order in the file is not that of the disk.
    fn new(spec: &Spec, mut file: Vec<u8>) -> Self {
        let (ratio, per_block, blocks) = (spec.ratio(), spec.block / spec.sector, spec.size.div_ceil(spec.block));
        let differencing = spec.kind == Kind::Differencing;
        let chunks = blocks.div_ceil(ratio);
        let entries = if differencing { chunks * (ratio + 1) } else { blocks + (blocks - 1) / ratio };
        let mut table = vec![0; entries];
        let mut bitmaps = vec![0; chunks];
        let held =
            |sector: usize| spec.runs.iter().rev().find(|(first, count, _)| (*first..first + count).contains(&sector));
        let extend = |file: &mut Vec<u8>, length: usize, byte: u8| {
            file.resize(file.len() + spec.gap * MIB, spec.garbage);
            let at = file.len();
            file.resize(at + length, byte);
            at
        };
        for block in (0..blocks).rev() {
            let index = block + block / ratio;
            if let Some((_, state)) = spec.states.iter().find(|(number, _)| *number == block) {
                table[index] = *state;
                continue;
            }
            let range = block * per_block..((block + 1) * per_block).min(spec.size / spec.sector);
            let sectors: Vec<(usize, u8)> =
                range.clone().filter_map(|sector| held(sector).map(|run| (sector, run.2))).collect();
            if sectors.is_empty() && !spec.hollow.contains(&block) && spec.kind != Kind::Fixed {
                continue;
            }
            let whole = !differencing || (sectors.len() == range.len() && !spec.by_bitmap);
            let at = extend(&mut file, spec.block, if differencing && !whole { spec.garbage } else { 0 });
            table[index] = at as u64 | if whole { 6 } else { 7 };
            let chunk = block / ratio;
            if !whole && bitmaps[chunk] == 0 {
                // Bits of blocks that are not partially there mean nothing.
                bitmaps[chunk] = extend(&mut file, MIB, spec.garbage);
                table[chunk * (ratio + 1) + ratio] = bitmaps[chunk] as u64 | 6;
            }
            if !whole {
                let bits = bitmaps[chunk] + block % ratio * per_block / 8;
                file[bits..bits + per_block / 8].fill(0);
            }
            for (sector, seed) in sectors {
                let within = sector - block * per_block;
                let data = at + within * spec.sector;
                file[data..data + spec.sector].copy_from_slice(&fill(sector, seed, spec.sector));
                if !whole {
                    file[bitmaps[chunk] + (block % ratio * per_block + within) / 8] |= 1 << (within % 8);
                }
            }
            if spec.garbage != 0 && block == blocks - 1 {
                // What lies behind the end of the disk is nobody's.
                file[at + (spec.size - block * spec.block)..at + spec.block].fill(spec.garbage);
            }
        }
        Self { file, table, bitmaps }
    }
}

/// The bytes of an image: header section, log, metadata, table, blocks.
pub fn build(spec: &Spec) -> Vec<u8> {
    let mut file = vec![0; 2 * MIB];
    file[..8].copy_from_slice(b"vhdxfile");
    let metadata_at = file.len();
    file.extend(metadata(spec));
    let mut table_at = file.len();
    if !spec.table_last {
        file.resize(table_at + MIB, 0);
    }
    let Body { mut file, table, bitmaps } = Body::new(spec, file);
    if spec.table_last {
        table_at = file.len();
        file.resize(table_at + MIB, 0);
    }
    file[table_at..table_at + MIB].fill(spec.garbage);
    for (index, entry) in table.iter().enumerate() {
        put64(&mut file, table_at + index * 8, *entry);
    }
    let mut regions = vec![0; 65536];
    regions[..4].copy_from_slice(b"regi");
    put32(&mut regions, 8, 2);
    for (index, (guid, place)) in [(BAT, table_at), (METADATA, metadata_at)].into_iter().enumerate() {
        let at = 16 + index * 32;
        regions[at..at + 16].copy_from_slice(&guid);
        put64(&mut regions, at + 16, place as u64);
        put32(&mut regions, at + 24, MIB);
        put32(&mut regions, at + 28, 1);
    }
    seal(&mut regions, 0, 65536);
    for place in [192 << 10, 256 << 10] {
        file[place..place + 65536].copy_from_slice(&regions);
    }
    let log_guid = if spec.log == Log::Pending { LOG_GUID } else { [0; 16] };
    for (place, sequence) in [(64 << 10, 7), (128 << 10, 8)] {
        file[place..place + 4096].copy_from_slice(&header(spec, sequence, log_guid));
    }
    if !spec.both {
        file[64 << 10] ^= 1;
    }
    let length = file.len() as u64;
    match spec.log {
        Log::Empty => {}
        Log::Stale => {
            let stale = entry(&[crate::Change::Zero(table_at, MIB)], 3, 0, [0x66; 16], [length; 2]);
            file[MIB..MIB + stale.len()].copy_from_slice(&stale);
        }
        Log::Pending => pend(&mut file, (table_at, table.len()), metadata_at, &bitmaps),
    }
    file.resize(file.len() + spec.tail * MIB, spec.garbage);
    file
}

/// Move what metadata says into the log: three entries, of which the first is done already and was undone since.
fn pend(file: &mut [u8], table: (usize, usize), metadata: usize, bitmaps: &[usize]) {
    let length = file.len() as u64;
    let mut changes: Vec<Vec<crate::Change>> = vec![Vec::new(), Vec::new(), Vec::new()];
    changes[0].push(crate::Change::Page(table.0, vec![0xee; 4096]));
    changes[1].extend(pages(file, table.0, (table.1 * 8).min(8192)));
    changes[1].extend([192 << 10, 256 << 10].into_iter().flat_map(|at| pages(file, at, 4096)));
    changes[2].extend(pages(file, metadata, 4096));
    changes[2].extend(pages(file, metadata + 65536, 8192));
    let slot = table.0 + (table.1 - 1) * 8;
    if bitmaps.iter().any(|place| *place != 0) {
        changes[2].extend(pages(file, slot, 8));
        for place in bitmaps.iter().filter(|place| **place != 0) {
            changes[2].extend(pages(file, *place, 8192));
        }
    }
    let mut at = 3 * 4096;
    let second = at + entry(&changes[0], 1, 0, LOG_GUID, [length; 2]).len();
    for (index, changes) in changes.iter().enumerate() {
        let tail = if index == 0 { at } else { second };
        let bytes = entry(changes, 0x1_ffff_fffe + index as u64, tail, LOG_GUID, [length; 2]);
        file[MIB + at..MIB + at + bytes.len()].copy_from_slice(&bytes);
        at += bytes.len();
    }
    for change in changes.into_iter().skip(1).flatten() {
        if let crate::Change::Page(place, _) = change {
            file[place..place + 4096].fill(0xbb);
        }
    }
}
