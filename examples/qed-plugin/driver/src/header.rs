//! The header ("QED Image File Format", section "Header"); all numbers are little-endian.

/// Bytes of the header that are used.
pub const HEADER_BYTES: usize = 64;
/// The first four of them.
pub const MAGIC: [u8; 4] = *b"QED\0";
/// `features`: there is a backing file.
const BACKING_FILE: u64 = 1;
/// `features`: the image was not closed cleanly. Its tables are verified before anything is changed in any case.
pub const NEED_CHECK: u64 = 2;
/// `features`: the backing file is raw, whatever it looks like.
pub const NO_PROBE: u64 = 4;
/// Where `autoclear_features` stands.
pub const AUTOCLEAR: u64 = 32;

/// A header whose numbers make sense by themselves; what they say of the file is not verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes: a power of two from 4 KiB to 64 MiB.
    pub cluster_size: u64,
    /// Bytes of the L1 table, and of every L2 table.
    pub table_bytes: u64,
    /// Bytes of the header, whole clusters.
    pub header_bytes: u64,
    pub features: u64,
    /// Bits that a program that does not know them clears when it changes the image.
    pub autoclear: u64,
    pub l1_table: u64,
    pub image_size: u64,
    /// Byte offset and length of the backing file's name.
    pub backing: Option<(u64, usize)>,
}

fn number(bytes: &[u8; HEADER_BYTES], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

impl Header {
    /// Parse a header.
    ///
    /// # Errors
    /// One clause that names the field.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, &'static str> {
        let (cluster_size, table_size) = (number(bytes, 4, 4), number(bytes, 8, 4));
        let (header_size, features) = (number(bytes, 12, 4), number(bytes, 16, 8));
        let backing = (features & BACKING_FILE != 0).then(|| (number(bytes, 56, 4), number(bytes, 60, 4)));
        let header = Self {
            cluster_size,
            table_bytes: table_size.saturating_mul(cluster_size),
            header_bytes: header_size.saturating_mul(cluster_size),
            features,
            autoclear: number(bytes, 32, 8),
            l1_table: number(bytes, 40, 8),
            image_size: number(bytes, 48, 8),
            backing: backing.and_then(|(offset, size)| Some((offset, usize::try_from(size).ok()?))),
        };
        let is_size = |size: u64, least: u64, most: u64| size.is_power_of_two() && (least..=most).contains(&size);
        let too_large = u128::from(header.image_size) > u128::from(header.entries()) * u128::from(header.coverage());
        let outside = |(offset, size): (u64, u64)| offset + size > header.header_bytes || size > 1023;
        let wrong = [
            (bytes[..4] != MAGIC, "the magic number is not that of QED"),
            (!is_size(cluster_size, 1 << 12, 1 << 26), "cluster_size is not a power of two from 4 KiB to 64 MiB"),
            (!is_size(table_size, 1, 16), "table_size is not a power of two from 1 to 16"),
            (features & !(BACKING_FILE | NEED_CHECK | NO_PROBE) != 0, "features has bits that are not known"),
            (header_size == 0, "header_size is 0"),
            (backing.is_some_and(outside), "the backing file's name leads out of the header, or is too long"),
            (!header.image_size.is_multiple_of(512), "image_size is no multiple of 512"),
            (too_large || header.image_size > 1 << 62, "image_size is more than the tables can map"),
            (header.l1_table > 1 << 62, "l1_table_offset is past the end of any file"),
            (header.l1_table < header.header_bytes, "l1_table_offset lies in the header"),
            (!header.l1_table.is_multiple_of(cluster_size.max(1)), "l1_table_offset is not the start of a cluster"),
        ];
        wrong.into_iter().find(|(is_wrong, _)| *is_wrong).map_or(Ok(header), |(_, text)| Err(text))
    }

    /// Entries of a table.
    pub fn entries(&self) -> u64 {
        self.table_bytes / 8
    }

    /// Guest bytes that an L2 table maps.
    pub fn coverage(&self) -> u64 {
        self.entries().saturating_mul(self.cluster_size)
    }
}
