//! Images as tests say them, and their bytes, straight from the specification.

use crate::bytes::{put32, put64, seal};
use crate::SECTOR;

/// The kind of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of the disk.
    Fixed,
    /// Blocks.
    Dynamic,
    /// Blocks over a parent.
    Differencing,
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its kind.
    pub kind: Kind,
    /// Bytes of the disk, whole sectors.
    pub size: usize,
    /// Bytes of a block.
    pub block: usize,
    /// Every byte of the unique ID.
    pub id: u8,
    /// Every byte of the parent's unique ID.
    pub parent: u8,
    /// Runs of sectors that the image holds: first, count, and the seed of [`fill`].
    pub runs: Vec<(usize, usize, u8)>,
    /// Blocks that are there although no sector of them is.
    pub hollow: Vec<usize>,
    /// XenServer's batmap.
    pub batmap: bool,
    /// The batmap says of blocks that are not there that they are full.
    pub dangling: bool,
    /// Entries of the table beyond those that the disk needs, which say nonsense.
    pub spare: usize,
    /// The table stands behind the blocks.
    pub table_last: bool,
    /// Sectors between one block and the next.
    pub gap: usize,
    /// There is a footer at the end.
    pub tail: bool,
    /// There is a copy of it in front.
    pub head: bool,
    /// Bytes that no sector shows, under bits that are 0 and in gaps.
    pub garbage: u8,
}

impl Spec {
    /// An empty image.
    pub fn new(kind: Kind, size: usize, block: usize) -> Self {
        Self {
            kind,
            size,
            block,
            id: 5,
            parent: 4,
            runs: Vec::new(),
            hollow: Vec::new(),
            batmap: false,
            dangling: false,
            spare: 0,
            table_last: false,
            gap: 0,
            tail: true,
            head: true,
            garbage: 0,
        }
    }

    /// The same with these runs of sectors besides.
    #[must_use]
    pub fn with(mut self, runs: impl IntoIterator<Item = (usize, usize, u8)>) -> Self {
        self.runs.extend(runs);
        self
    }
}

/// The bytes of a sector, none of them zero.
pub fn fill(sector: usize, seed: u8) -> Vec<u8> {
    (0..SECTOR).map(|at| ((at / 7) ^ sector ^ (seed as usize * 37)) as u8 | 1).collect()
}

/// A footer; `data_offset` is that of the dynamic header.
fn footer(spec: &Spec, data_offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR];
    bytes[..8].copy_from_slice(b"conectix");
    put32(&mut bytes, 8, 2);
    put32(&mut bytes, 12, 0x10000);
    put64(&mut bytes, 16, data_offset);
    bytes[28..32].copy_from_slice(if spec.batmap { b"tap\0" } else { b"win " });
    put32(&mut bytes, 32, if spec.batmap { 0x10003 } else { 0xa0000 });
    bytes[36..40].copy_from_slice(b"Wi2k");
    put64(&mut bytes, 40, spec.size as u64);
    put64(&mut bytes, 48, spec.size as u64);
    put32(&mut bytes, 56, 0x0001_0411);
    put32(&mut bytes, 60, [2, 3, 4][spec.kind as usize]);
    bytes[68..84].fill(spec.id);
    seal(&mut bytes, 0, SECTOR, 64);
    bytes
}

/// The names of a parent, with their codes.
fn names() -> Vec<(&'static [u8; 4], Vec<u8>)> {
    let wide = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    vec![(b"W2ru", wide(".\\base.vhd")), (b"W2ku", wide("C:\\disks\\base.vhd"))]
}

/// The bytes of an image.
pub fn build(spec: &Spec) -> Vec<u8> {
    let held =
        |sector: usize| spec.runs.iter().rev().find(|(first, count, _)| (*first..first + count).contains(&sector));
    if spec.kind == Kind::Fixed {
        let sector = |number| held(number).map_or_else(|| vec![0; SECTOR], |run| fill(number, run.2));
        let mut file: Vec<u8> = (0..spec.size / SECTOR).flat_map(sector).collect();
        file.extend(footer(spec, u64::MAX));
        return file;
    }
    let (per_block, blocks) = (spec.block / SECTOR, spec.size.div_ceil(spec.block));
    let entries = blocks + spec.spare;
    let bitmap_bytes = per_block.div_ceil(8).next_multiple_of(SECTOR);
    let mut file = footer(spec, 512);
    file.resize(1536, 0);
    let mut locators = Vec::new();
    if spec.kind == Kind::Differencing {
        for (code, name) in names() {
            locators.push((code, name.len(), file.len()));
            file.extend(name);
            file.resize(file.len().next_multiple_of(SECTOR), 0);
        }
    }
    let mut table = vec![usize::MAX; entries];
    table[blocks..].fill(2);
    let table_bytes = (entries * 4).next_multiple_of(SECTOR);
    let map_bytes = (spec.size / spec.block / 8).div_ceil(SECTOR).max(1) * SECTOR;
    let metadata_bytes = table_bytes + if spec.batmap { SECTOR + map_bytes } else { 0 };
    let mut table_at = file.len();
    if !spec.table_last {
        file.resize(file.len() + metadata_bytes, 0);
    }
    let mut map = vec![0u8; map_bytes];
    let mut sectors: Vec<(usize, u8)> = Vec::new();
    // Blocks from the last to the first: their order in the file is not that of the disk.
    for block in (0..blocks).rev() {
        sectors.clear();
        let range = block * per_block..((block + 1) * per_block).min(spec.size / SECTOR);
        sectors.extend(range.clone().filter_map(|sector| held(sector).map(|run| (sector, run.2))));
        if sectors.is_empty() && !spec.hollow.contains(&block) {
            continue;
        }
        file.resize(file.len() + spec.gap * SECTOR, spec.garbage);
        table[block] = file.len() / SECTOR;
        let at = file.len();
        file.resize(at + bitmap_bytes, 0);
        file.resize(at + bitmap_bytes + spec.block, spec.garbage);
        for &(sector, seed) in &sectors {
            let within = sector - block * per_block;
            file[at + within / 8] |= 0x80 >> (within % 8);
            let data = at + bitmap_bytes + within * SECTOR;
            file[data..data + SECTOR].copy_from_slice(&fill(sector, seed));
        }
        if sectors.len() == per_block {
            map[block / 8] |= 0x80 >> (block % 8);
        }
    }
    for block in (0..blocks).filter(|&block| spec.dangling && table[block] == usize::MAX) {
        map[block / 8] |= 0x80 >> (block % 8);
    }
    if spec.table_last {
        table_at = file.len();
        file.resize(table_at + metadata_bytes, 0);
    }
    file[table_at..table_at + table_bytes].fill(0xff);
    for (block, entry) in table.iter().enumerate() {
        put32(&mut file, table_at + block * 4, *entry);
    }
    if spec.batmap {
        let at = table_at + table_bytes;
        file[at..at + 8].copy_from_slice(b"tdbatmap");
        put64(&mut file, at + 8, (at + SECTOR) as u64);
        put32(&mut file, at + 16, map_bytes / SECTOR);
        put32(&mut file, at + 20, 0x10002);
        let sum: u32 = map.iter().map(|&byte| u32::from(byte)).sum();
        put32(&mut file, at + 24, !sum as usize);
        file[at + SECTOR..at + SECTOR + map_bytes].copy_from_slice(&map);
    }
    file[512..520].copy_from_slice(b"cxsparse");
    put64(&mut file, 512 + 8, u64::MAX);
    put64(&mut file, 512 + 16, table_at as u64);
    put32(&mut file, 512 + 24, 0x10000);
    put32(&mut file, 512 + 28, entries);
    put32(&mut file, 512 + 32, spec.block);
    if spec.kind == Kind::Differencing {
        file[512 + 40..512 + 56].fill(spec.parent);
        for (at, unit) in "base.vhd".encode_utf16().enumerate() {
            file[512 + 64 + at * 2..][..2].copy_from_slice(&unit.to_be_bytes());
        }
        for (index, (code, length, offset)) in locators.into_iter().enumerate() {
            let at = 512 + 576 + index * 24;
            file[at..at + 4].copy_from_slice(code);
            put32(&mut file, at + 4, 512);
            put32(&mut file, at + 8, length);
            put64(&mut file, at + 16, offset as u64);
        }
    }
    seal(&mut file, 512, 1024, 36);
    if spec.tail {
        file.extend(footer(spec, 512));
    }
    if !spec.head {
        file[..8].fill(0);
    }
    file
}
