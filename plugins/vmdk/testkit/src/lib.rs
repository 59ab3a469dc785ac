//! vmdk images of 1 KiB grains in memory, for tests: made, read and checked from the bytes, without the code that is tested,
//! and the commits of pairs of such images.
//!
//! Tests hand in images that they have built themselves. What makes no sense here panics, and so fails the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic here is a test that fails")]
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small: every number in them fits")]

pub mod delta;
pub mod pair;

mod chains;
mod delta_chains;
mod delta_kit;
mod delta_layout;
mod delta_salvage;
mod descriptor;
mod kit;
mod layout;
mod packed;
mod salvage;

pub use delta_kit::{CowdKit, SeSparseKit};
pub use descriptor::{recorded, DescriptorKit};
pub use instar_testkit::crashes;
pub use kit::Kit;
pub use packed::EXTENT;

use instar_guest_sdk::abi::DeviceConfig;
use instar_testkit::padded;

/// Bytes of a grain.
pub const GRAIN: usize = 1024;
const TABLE: usize = 2048;

/// What a grain holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The bytes of [`fill`] for this seed.
    Data(u8),
    /// Zeroes, without a place in the file.
    Zero,
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Bytes of the disk, whole sectors.
    pub size: usize,
    /// Grains that the image holds, by their number.
    pub grains: Vec<(usize, State)>,
    /// Content ID.
    pub cid: u32,
    /// Content ID of the parent, [`u32::MAX`] for none.
    pub parent: u32,
    /// There is a second directory with tables of its own.
    pub redundant: bool,
    /// Grains may be [`State::Zero`].
    pub zeroed: bool,
    /// Grains are compressed: streamOptimized.
    pub compressed: bool,
    /// Tables that hold nothing are not there.
    pub lazy_tables: bool,
    /// The directory is at the end, named by a footer.
    pub footer: bool,
    /// Sectors of the descriptor. If there are several, its text is longer than one.
    pub descriptor: usize,
}

impl Spec {
    /// An empty image.
    pub fn new(size: usize, cid: u32, parent: u32) -> Self {
        Self {
            size,
            grains: Vec::new(),
            cid,
            parent,
            redundant: true,
            zeroed: false,
            compressed: false,
            lazy_tables: false,
            footer: false,
            descriptor: 1,
        }
    }

    /// The same image with these grains as well.
    pub fn with(mut self, grains: impl IntoIterator<Item = (usize, State)>) -> Self {
        self.grains.extend(grains);
        self.zeroed |= self.grains.iter().any(|(_, state)| *state == State::Zero);
        self
    }
}

/// Write a little-endian number of 32 bits at byte `at`.
pub fn put32(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}

/// The little-endian number of 32 bits at byte `at`. Panics past the end.
pub fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// The little-endian number of 64 bits at byte `at`. Panics past the end.
pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The bytes of a grain, different for each grain and seed.
pub fn fill(grain: usize, seed: u8) -> Vec<u8> {
    (0..GRAIN).map(|i| (i / 7) as u8 ^ seed ^ (grain as u8).wrapping_mul(31)).collect()
}

fn header(spec: &Spec, redundant: usize, directory: Option<usize>, overhead: usize) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..4].copy_from_slice(b"KDMV");
    put32(&mut bytes, 4, if spec.compressed { 3 } else { 1 });
    let flags = 1
        | if spec.redundant { 2 } else { 0 }
        | if spec.zeroed { 4 } else { 0 }
        | if spec.compressed { 3 << 16 } else { 0 };
    put32(&mut bytes, 8, flags);
    put32(&mut bytes, 12, spec.size / 512);
    put32(&mut bytes, 20, GRAIN / 512);
    put32(&mut bytes, 28, 1);
    put32(&mut bytes, 36, spec.descriptor);
    put32(&mut bytes, 44, 512);
    put32(&mut bytes, 48, redundant / 512);
    bytes[56..64].copy_from_slice(&directory.map_or(u64::MAX, |at| (at / 512) as u64).to_le_bytes());
    put32(&mut bytes, 64, overhead / 512);
    bytes[73..77].copy_from_slice(b"\n \r\n");
    bytes[77] = u8::from(spec.compressed);
    bytes
}

/// Build the image.
pub fn build(spec: &Spec) -> Vec<u8> {
    let grains = spec.size.div_ceil(GRAIN);
    let tables = grains.div_ceil(512);
    let copies = if spec.redundant { 2 } else { 1 };
    let mut file = vec![0; 512 + spec.descriptor * 512];
    // Behind that, the parent's name begins in the first sector and ends in the second.
    let comment = if spec.descriptor > 1 { format!("# {}\n", "comment ".repeat(50)) } else { String::new() };
    let text = format!(
        "{comment}version=1\nCID={:x}\nparentCID={:08x}\ncreateType=\"{}\"\nparentFileNameHint=\"b\"\nRW 1 SPARSE \"x\"\n",
        spec.cid,
        spec.parent,
        if spec.compressed { "streamOptimized" } else { "monolithicSparse" }
    );
    file[512..512 + text.len()].copy_from_slice(text.as_bytes());
    let present: Vec<bool> =
        (0..tables).map(|t| !spec.lazy_tables || spec.grains.iter().any(|(g, _)| g / 512 == t)).collect();
    let mut entries = vec![0usize; tables * 512];
    let mut directories = [0usize; 2];
    let metadata = |file: &mut Vec<u8>, directories: &mut [usize; 2]| {
        for directory in directories.iter_mut().take(copies) {
            *directory = file.len();
            file.resize((file.len() + tables * 4).next_multiple_of(512), 0);
            for (table, _) in present.iter().enumerate().filter(|(_, there)| **there) {
                let sector = file.len() / 512;
                put32(file, *directory + table * 4, sector);
                file.resize(file.len() + TABLE, 0);
            }
        }
    };
    if !spec.footer {
        metadata(&mut file, &mut directories);
    }
    file.resize(file.len().next_multiple_of(GRAIN), 0);
    let overhead = file.len();
    for (grain, state) in &spec.grains {
        entries[*grain] = match state {
            State::Zero => 1,
            State::Data(seed) => {
                let at = file.len();
                let bytes = fill(*grain, *seed);
                if spec.compressed {
                    let stream = miniz_oxide::deflate::compress_to_vec_zlib(&bytes, 6);
                    file.extend_from_slice(&((grain * GRAIN / 512) as u64).to_le_bytes());
                    file.extend_from_slice(&(stream.len() as u32).to_le_bytes());
                    file.extend_from_slice(&stream);
                    file.resize(file.len().next_multiple_of(512), 0);
                } else {
                    file.extend_from_slice(&bytes);
                }
                at / 512
            }
        };
    }
    if spec.footer {
        metadata(&mut file, &mut directories);
    }
    for directory in directories.iter().take(copies) {
        for table in 0..tables {
            let at = le32(&file, directory + table * 4) * 512;
            for entry in (0..512).filter(|_| at != 0) {
                put32(&mut file, at + entry * 4, entries[table * 512 + entry]);
            }
        }
    }
    let first = header(spec, directories[1], (!spec.footer).then_some(directories[0]), overhead);
    file[..512].copy_from_slice(&first);
    if spec.footer {
        let mut marker = vec![0; 512];
        (marker[0], marker[12]) = (1, 3);
        file.extend(marker);
        file.extend(header(spec, directories[1], Some(directories[0]), overhead));
        file.extend(vec![0; 512]);
    }
    file
}

/// What the image says, from its bytes.
pub struct View<'a> {
    /// The file.
    pub bytes: &'a [u8],
    /// Bytes of the disk.
    pub size: usize,
    /// Entry 1 means zeroes.
    pub zeroed: bool,
    /// Grains are compressed.
    pub compressed: bool,
    /// Entries by grain, from the first and from the second directory.
    pub entries: Vec<Vec<usize>>,
}

impl<'a> View<'a> {
    /// Read header and tables. Panics if the bytes are no image.
    pub fn new(bytes: &'a [u8]) -> Self {
        let flags = le32(bytes, 8);
        let size = le64(bytes, 12) as usize * 512;
        let base = if le64(bytes, 56) == u64::MAX { bytes.len() - 1024 } else { 0 };
        let tables = size.div_ceil(GRAIN).div_ceil(512);
        let read = |directory: usize| {
            let entry = |grain: usize| match le32(bytes, directory * 512 + grain / 512 * 4) * 512 {
                0 => 0,
                table => le32(bytes, table + grain % 512 * 4),
            };
            (0..tables * 512).map(entry).collect::<Vec<_>>()
        };
        let mut entries = vec![read(le64(bytes, base + 56) as usize)];
        if flags & 2 != 0 {
            entries.push(read(le64(bytes, base + 48) as usize));
        }
        Self { bytes, size, zeroed: flags & 4 != 0, compressed: flags & (1 << 16) != 0, entries }
    }

    /// The text of the descriptor that the header names.
    pub fn text(&self) -> String {
        let (at, length) = (le64(self.bytes, 28) as usize * 512, le64(self.bytes, 36) as usize * 512);
        let text = String::from_utf8_lossy(&self.bytes[at..at + length]).into_owned();
        text.split('\0').next().unwrap_or_default().to_owned()
    }

    fn digits(&self, key: &str) -> String {
        self.text().lines().find_map(|line| line.strip_prefix(key)).unwrap().to_owned()
    }

    fn id(&self, key: &str) -> u32 {
        u32::from_str_radix(&self.digits(key), 16).unwrap()
    }

    /// Its content ID.
    pub fn cid(&self) -> u32 {
        self.id("CID=")
    }

    /// The content ID that its parent has, as it says.
    pub fn parent(&self) -> u32 {
        self.id("parentCID=")
    }

    /// The parent is yet to get the ID.
    pub fn announced(&self) -> bool {
        let digits = self.digits("parentCID=");
        let first = digits.trim_start_matches('0').starts_with(|digit: char| digit.is_ascii_uppercase());
        first && digits.chars().filter(char::is_ascii_uppercase).count() == 1
    }

    /// Whether the engine takes the other image for this one's parent.
    pub fn goes_with(&self, parent: &View<'_>) -> bool {
        let (recorded, has) = (self.parent(), parent.cid());
        recorded == has || self.announced() && recorded == instar_vmdk_format::next_content_id(has, Some(self.cid()))
    }

    /// How many grains it holds.
    pub fn held(&self) -> usize {
        self.entries[0].iter().filter(|&&entry| entry != 0).count()
    }

    /// What a guest reads, over the bytes that are below.
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        let mut content = padded(below, self.size);
        for (grain, entry) in self.entries[0].iter().enumerate().take(self.size.div_ceil(GRAIN)) {
            let start = grain * GRAIN;
            let end = (start + GRAIN).min(self.size);
            match entry {
                0 => {}
                1 if self.zeroed => content[start..end].fill(0),
                sector => {
                    let at = sector * 512;
                    let bytes = if self.compressed {
                        miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(&self.bytes[at + 12..], GRAIN).unwrap()
                    } else {
                        padded(&self.bytes[at..], GRAIN)
                    };
                    content[start..end].copy_from_slice(&bytes[..end - start]);
                }
            }
        }
        content
    }

    /// Every entry names a place of its own inside the file, behind the metadata.
    pub fn assert_consistent(&self) {
        for entries in &self.entries {
            let mut places: Vec<usize> =
                entries.iter().copied().filter(|&e| e > 1 || (e == 1 && !self.zeroed)).collect();
            places.sort_unstable();
            for pair in places.windows(2) {
                assert!(pair[0] + if self.compressed { 1 } else { GRAIN / 512 } <= pair[1], "grains overlap");
            }
            if let Some(last) = places.last() {
                assert!(last * 512 < self.bytes.len(), "a grain past the end of the file");
            }
        }
    }
}

/// What the host would tell the guest of an image.
pub fn device(number: u32, bytes: &[u8], max_length: u64) -> DeviceConfig {
    DeviceConfig {
        device: number,
        file_length: bytes.len() as u64,
        max_length,
        virtual_size: le64(bytes, 12) * 512,
        cluster_size: le64(bytes, 20) * 512,
        ..DeviceConfig::default()
    }
}
