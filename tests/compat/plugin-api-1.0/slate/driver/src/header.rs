//! The header, for both halves. All numbers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 0 to 7 | [`MAGIC`] |
//! | 8 to 15 | virtual size in bytes, a multiple of 512 |
//! | 16 to 19, 20 to 23 | bytes of the backing's names and of its format; 0 for none |
//! | 24 to 31, 32 to 39 | the image's content ID, and that of its parent; 0 for none |
//! | 40 | 1 if the parent is only about to get that content ID |
//! | 64 on | the names that the backing may have, with a zero byte between two of them, then its format |
//!
//! At byte 4096 stands an entry of 8 bytes for each cluster: 0 for one that the image does not hold, 1 for zeroes,
//! `2 | byte << 8` for one that is full of that byte, and otherwise where it is in the file.

/// The first eight bytes.
pub const MAGIC: [u8; 8] = *b"SLATE\0\0\x01";
/// Bytes of the header; the table follows.
pub const HEADER_BYTES: u64 = 4096;
/// Bytes of a cluster.
pub const CLUSTER: u64 = 65536;
/// Bytes of the largest disk.
pub const LARGEST: u64 = 1 << 30;
/// Where the backing's names begin.
pub const NAME_AT: u64 = 64;
/// Bytes that names and format may have together.
const NAME_MAX: u64 = 2048;

/// A header whose numbers make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes.
    pub virtual_size: u64,
    /// Bytes of the backing's names and of its format.
    pub backing: (u64, u64),
    /// The image's content ID.
    pub content_id: u64,
    /// The content ID of its parent, or 0.
    pub parent_id: u64,
    /// The parent is only about to get it.
    pub announced: bool,
}

impl Header {
    /// Parse the first 64 bytes.
    ///
    /// # Errors
    /// One clause that names the field.
    pub fn parse(bytes: &[u8; 64]) -> Result<Self, &'static str> {
        let number = |at: usize, length: usize| {
            bytes[at..at + length].iter().rev().fold(0, |value: u64, &byte| value << 8 | u64::from(byte))
        };
        let header = Self {
            virtual_size: number(8, 8),
            backing: (number(16, 4), number(20, 4)),
            content_id: number(24, 8),
            parent_id: number(32, 8),
            announced: bytes[40] == 1,
        };
        if bytes[..8] != MAGIC {
            return Err("the magic number is not that of slate");
        }
        if header.virtual_size > LARGEST || header.virtual_size % 512 != 0 {
            return Err("the virtual size is more than 1 GiB, or no multiple of 512");
        }
        if header.backing.0 + header.backing.1 > NAME_MAX {
            return Err("the backing's names are too long");
        }
        if header.content_id == 0 {
            return Err("the content ID is 0");
        }
        Ok(header)
    }

    /// The first 64 bytes.
    pub fn bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.virtual_size.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.backing.0.to_le_bytes()[..4]);
        bytes[20..24].copy_from_slice(&self.backing.1.to_le_bytes()[..4]);
        bytes[24..32].copy_from_slice(&self.content_id.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.parent_id.to_le_bytes());
        bytes[40] = u8::from(self.announced);
        bytes
    }

    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.virtual_size.div_ceil(CLUSTER)
    }

    /// Where the first cluster can be in the file.
    pub fn data_start(&self) -> u64 {
        (HEADER_BYTES + self.clusters() * 8).next_multiple_of(CLUSTER)
    }
}

/// The content ID that an image gets from what is above it, whose content ID is `child` if it has one.
pub fn next_content_id(own: u64, child: Option<u64>) -> u64 {
    own.wrapping_add(1).wrapping_add(child.unwrap_or(0) << 16).max(1)
}
