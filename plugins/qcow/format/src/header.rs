//! The header (`QCowHeader`), and what `qcow_open` demands of it.

use crate::{FormatError, ENTRY_BYTES, SECTOR};
use alloc::format;
use core::ops::Range;

/// Why an encrypted image is refused, and what to do: both halves say the same.
pub const ENCRYPTED: &str = "encryption (AES) is not supported: make a copy without it, `qemu-img convert --object \
     secret,id=s,file=PASSPHRASE --image-opts -O qcow2 driver=qcow,encrypt.key-secret=s,file.filename=IMAGE NEW`";

/// Bytes of the header.
pub const HEADER_BYTES: usize = 48;
/// Magic number and version: the first bytes of every image.
pub const MAGIC: [u8; 8] = *b"QFI\xfb\0\0\0\x01";
/// The longest name of a backing file in bytes.
pub const MAX_NAME: u64 = 1023;
/// The most entries that an L1 table has (`INT_MAX / sizeof(uint64_t)`).
pub const MOST_L1_ENTRIES: u64 = (1 << 28) - 1;

/// Byte offsets of the fields.
pub mod field {
    /// Where the backing file's name stands, 8 bytes; 0 without one.
    pub const BACKING_OFFSET: usize = 8;
    /// The name's length in bytes, 4 bytes.
    pub const BACKING_SIZE: usize = 16;
    /// When the backing file was changed, 4 bytes: nobody has ever looked at it.
    pub const MTIME: usize = 20;
    /// Bytes of the disk, 8 bytes.
    pub const SIZE: usize = 24;
    /// The binary logarithm of a cluster's bytes, 1 byte.
    pub const CLUSTER_BITS: usize = 32;
    /// The binary logarithm of an L2 table's entries, 1 byte.
    pub const L2_BITS: usize = 33;
    /// How clusters are encrypted, 4 bytes: 0 not at all, 1 with AES.
    pub const CRYPT: usize = 36;
    /// Where the L1 table begins, 8 bytes.
    pub const L1_OFFSET: usize = 40;
}

/// A header whose numbers make sense by themselves; what they say of the file is not verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the header says of the disk's size in bytes; see [`Header::virtual_size`].
    pub size: u64,
    /// The binary logarithm of a cluster's bytes, from 9 to 16.
    pub cluster_bits: u32,
    /// The binary logarithm of an L2 table's entries, from 6 to 13.
    pub l2_bits: u32,
    /// Clusters are encrypted.
    pub encrypted: bool,
    /// Where the L1 table begins in the file: a multiple of 8, behind the header.
    pub l1_offset: u64,
    /// Where the backing file's name stands in the file, and its length in bytes, from 1 to [`MAX_NAME`].
    pub backing: Option<(u64, usize)>,
}

/// The big-endian number in `length` bytes.
fn number(bytes: &[u8; HEADER_BYTES], at: usize, length: usize) -> u64 {
    bytes.iter().skip(at).take(length).fold(0, |value, &byte| value << 8 | u64::from(byte))
}

impl Header {
    /// Parse a header.
    ///
    /// # Errors
    /// One clause that names the field.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..4] != MAGIC[..4] {
            return Err(FormatError::corrupt("the magic number is not that of qcow"));
        }
        let version = number(bytes, 4, 4);
        if version != 1 {
            return Err(FormatError::unsupported(format!("version {version} is not version 1")));
        }
        let small = |at: usize, least: u32, most: u32, name: &str| {
            let bits = bytes.get(at).map_or(0, |&byte| u32::from(byte));
            let good = (least..=most).contains(&bits);
            let error = || FormatError::corrupt(format!("{name} is {bits}, not one of {least} to {most}"));
            good.then_some(bits).ok_or_else(error)
        };
        let cluster_bits = small(field::CLUSTER_BITS, 9, 16, "cluster_bits")?;
        let l2_bits = small(field::L2_BITS, 6, 13, "l2_bits")?;
        let crypt = number(bytes, field::CRYPT, 4);
        if crypt > 1 {
            return Err(FormatError::unsupported(format!("crypt_method {crypt} is not known")));
        }
        let (name_at, name_length) = (number(bytes, field::BACKING_OFFSET, 8), number(bytes, field::BACKING_SIZE, 4));
        if name_at != 0 && name_length > MAX_NAME {
            return Err(FormatError::corrupt(format!("backing_file_size is {name_length}, more than {MAX_NAME}")));
        }
        let backing = (name_at != 0 && name_length != 0).then(|| usize::try_from(name_length).unwrap_or(0));
        let header = Self {
            size: number(bytes, field::SIZE, 8),
            cluster_bits,
            l2_bits,
            encrypted: crypt == 1,
            l1_offset: number(bytes, field::L1_OFFSET, 8),
            backing: backing.map(|length| (name_at, length)),
        };
        header.verified()
    }

    fn verified(self) -> Result<Self, FormatError> {
        if self.size <= 1 {
            return Err(FormatError::corrupt(format!("the size of the disk is {} bytes, less than 2", self.size)));
        }
        if self.l1_entries() > MOST_L1_ENTRIES {
            let text = format!("the size of the disk is {} bytes, more than the L1 table can map", self.size);
            return Err(FormatError::corrupt(text));
        }
        let l1 = self.l1_offset;
        if l1 < HEADER_BYTES as u64 || l1 > 1 << 62 {
            return Err(FormatError::corrupt(format!("l1_table_offset is {l1}, which cannot be a table's")));
        }
        if !l1.is_multiple_of(ENTRY_BYTES) {
            // An entry might lie in two sectors then, and no change of it would be whole after a power loss.
            return Err(FormatError::unsupported(format!("l1_table_offset is {l1}, no multiple of 8")));
        }
        if let Some((name, length)) = self.backing {
            let end = name.checked_add(length as u64).filter(|&end| end <= 1 << 62);
            let apart = end.is_some_and(|end| end <= l1 || name >= self.l1_range().end);
            if name < HEADER_BYTES as u64 || !apart {
                return Err(FormatError::corrupt(format!(
                    "backing_file_offset is {name}, where header or L1 table lie, or no file ends"
                )));
            }
        }
        Ok(self)
    }

    /// Bytes of the disk: whole sectors, the last of which ends at or before `size`, as in QEMU.
    #[must_use]
    pub const fn virtual_size(&self) -> u64 {
        self.size - self.size % SECTOR
    }

    /// Bytes of a cluster.
    #[must_use]
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 table, whole sectors.
    #[must_use]
    pub const fn table_bytes(&self) -> u64 {
        ENTRY_BYTES << self.l2_bits
    }

    /// Bytes of the disk that an L2 table maps.
    #[must_use]
    pub const fn coverage(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits)
    }

    /// Entries of the L1 table.
    #[must_use]
    pub const fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.coverage())
    }

    /// Where the L1 table lies in the file.
    #[must_use]
    pub const fn l1_range(&self) -> Range<u64> {
        self.l1_offset..self.l1_offset + self.l1_entries() * ENTRY_BYTES
    }

    /// Where the backing file's name stands in the file; nowhere, at byte 0, without one.
    #[must_use]
    pub fn name_range(&self) -> Range<u64> {
        self.backing.map_or(0..0, |(offset, length)| offset..offset + length as u64)
    }

    /// The end of what an empty image needs of its file: header, name and L1 table.
    #[must_use]
    pub fn keep_end(&self) -> u64 {
        self.l1_range().end.max(self.name_range().end)
    }

    /// The bytes from [`field::SIZE`] to the header's end, with another size of the disk and place of the L1 table: one
    /// write within the first sector, so that a power loss leaves both as they were, or neither.
    #[must_use]
    pub fn resized(&self, size: u64, l1_offset: u64) -> [u8; HEADER_BYTES - field::SIZE] {
        let mut bytes = [0; HEADER_BYTES - field::SIZE];
        let at = |field: usize| field - field::SIZE;
        bytes[..8].copy_from_slice(&size.to_be_bytes());
        bytes[at(field::CLUSTER_BITS)] = self.cluster_bits.to_le_bytes()[0];
        bytes[at(field::L2_BITS)] = self.l2_bits.to_le_bytes()[0];
        bytes[at(field::CRYPT) + 3] = u8::from(self.encrypted);
        bytes[at(field::L1_OFFSET)..].copy_from_slice(&l1_offset.to_be_bytes());
        bytes
    }
}
