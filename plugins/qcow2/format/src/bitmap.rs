//! Persistent bitmaps ("Bitmaps" in the specification): extension, directory, tables, data.
//!
//! Bit `n` of a bitmap's data says that granule `n` of the virtual disk was written to. Bits are counted from the least
//! significant bit of the first byte ("Bitmap data").

use crate::extension::Bitmaps;
use crate::table::{aligned, EntryError};
use crate::types::{ClusterSize, HostOffset};
use alloc::format;
use alloc::string::String;

/// Byte offset within a directory entry of `bitmap_table_size` (4 bytes), after `bitmap_table_offset` (8 bytes).
pub const BITMAP_TABLE_SIZE_FIELD: u64 = 8;
/// Byte offset within a directory entry of `flags` (4 bytes).
pub const BITMAP_FLAGS_FIELD: u64 = 12;
/// Bytes of a directory entry before its extra data and name ("Bitmap directory").
pub const BITMAP_ENTRY_BYTES: usize = 24;
/// Most bitmaps that QEMU takes (`QCOW2_MAX_BITMAPS`).
const MAX_BITMAPS: u32 = 65535;
/// Longest directory that QEMU takes, in bytes (`QCOW2_MAX_BITMAP_DIRECTORY_SIZE`).
const MAX_DIRECTORY: u64 = 1024 * 65535;
/// Longest name in bytes ("Bitmap directory", `name_size`).
const MAX_NAME: u16 = 1023;
/// Most bytes of data clusters of one bitmap that QEMU takes (`BME_MAX_PHYS_SIZE`).
const MAX_DATA: u64 = 512 << 20;
/// Length of the extension's data in bytes ("Bitmaps extension").
const EXTENSION_BYTES: usize = 24;

const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const EXTRA_DATA_COMPATIBLE: u32 = 4;
/// `type` of a dirty tracking bitmap: the only one there is.
const DIRTY_TRACKING: u8 = 1;

/// What stands in the way of using the bitmaps of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapError {
    /// A value that no image may have.
    Corrupt(String),
    /// A value that a later version of the format may give a meaning.
    Unsupported(String),
}

fn corrupt<T>(text: String) -> Result<T, BitmapError> {
    Err(BitmapError::Corrupt(text))
}

impl Bitmaps {
    /// Parse and verify the data of a bitmaps extension, as far as it can be judged without the file.
    ///
    /// # Errors
    /// [`BitmapError::Corrupt`] for a wrong length, reserved bits, no bitmap or too many, a directory that does not
    /// begin with a cluster, or one that is too long or too short for its bitmaps.
    pub fn checked(data: &[u8], size: ClusterSize) -> Result<Self, BitmapError> {
        let Some(bitmaps) = Self::parse(data).filter(|_| data.len() == EXTENSION_BYTES) else {
            return corrupt(format!("the bitmaps extension has {} bytes, not 24", data.len()));
        };
        if data.get(4..8) != Some(&[0; 4]) {
            return corrupt("reserved bytes of the bitmaps extension are not 0".into());
        }
        if bitmaps.count == 0 || bitmaps.count > MAX_BITMAPS {
            return corrupt(format!("the bitmaps extension counts {} bitmaps, not 1 to 65535", bitmaps.count));
        }
        // An entry has a name, and is padded to 8 bytes.
        let least = u64::from(bitmaps.count) * (BITMAP_ENTRY_BYTES as u64 + 8);
        if bitmaps.directory_size < least || bitmaps.directory_size > MAX_DIRECTORY {
            let (length, count) = (bitmaps.directory_size, bitmaps.count);
            return corrupt(format!("the bitmap directory has {length} bytes for {count} bitmaps"));
        }
        if bitmaps.directory_offset == 0 || size.offset_in(bitmaps.directory_offset) != 0 {
            let offset = bitmaps.directory_offset;
            return corrupt(format!("bitmap_directory_offset is {offset}, not the start of a cluster"));
        }
        Ok(bitmaps)
    }
}

/// An entry of the bitmap directory, without its extra data and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Where the bitmap table begins.
    pub table: HostOffset,
    /// Entries of the bitmap table: one for each cluster of bitmap data.
    pub table_entries: u32,
    /// It was not saved: its size and its bits mean nothing, but its clusters are its own.
    pub in_use: bool,
    /// It must reflect every change of the virtual disk.
    pub auto: bool,
    /// Extra data that is not known does not stand in the way of using it.
    pub extra_data_compatible: bool,
    /// log2 of the granularity in bytes.
    pub granularity_bits: u32,
    /// Bytes of extra data.
    pub extra_data_bytes: u32,
    /// Length of the name in bytes.
    pub name_bytes: u16,
}

impl Bitmap {
    /// Parse an entry from its first [`BITMAP_ENTRY_BYTES`] bytes.
    ///
    /// # Errors
    /// [`BitmapError::Corrupt`] for values that no bitmap may have, [`BitmapError::Unsupported`] for a type or flags
    /// that the specification does not know.
    pub fn parse(fixed: &[u8; BITMAP_ENTRY_BYTES], size: ClusterSize) -> Result<Self, BitmapError> {
        let u32_at = |i: usize| u32::from_be_bytes([fixed[i], fixed[i + 1], fixed[i + 2], fixed[i + 3]]);
        let table = HostOffset((u64::from(u32_at(0)) << 32) | u64::from(u32_at(4)));
        let (table_entries, flags) = (u32_at(8), u32_at(12));
        let bitmap = Self {
            table,
            table_entries,
            in_use: flags & IN_USE != 0,
            auto: flags & AUTO != 0,
            extra_data_compatible: flags & EXTRA_DATA_COMPATIBLE != 0,
            granularity_bits: u32::from(fixed[17]),
            name_bytes: u16::from_be_bytes([fixed[18], fixed[19]]),
            extra_data_bytes: u32_at(20),
        };
        if flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE) != 0 {
            return Err(BitmapError::Unsupported(format!("has unknown flags (0x{flags:x})")));
        }
        if fixed[16] != DIRTY_TRACKING {
            return Err(BitmapError::Unsupported(format!("is of the unknown type {}", fixed[16])));
        }
        if table.0 == 0 || size.offset_in(table.0) != 0 {
            return corrupt(format!("has its table at offset {table}, which is not the start of a cluster"));
        }
        if !matches!(u64::from(table_entries).checked_mul(size.bytes()), Some(1..=MAX_DATA)) {
            return corrupt(format!("has a table of {table_entries} entries"));
        }
        if !(9..=31).contains(&bitmap.granularity_bits) {
            return corrupt(format!("has a granularity of 2^{} bytes, not 2^9 to 2^31", bitmap.granularity_bits));
        }
        if !(1..=MAX_NAME).contains(&bitmap.name_bytes) {
            return corrupt(format!("has a name of {} bytes, not 1 to 1023", bitmap.name_bytes));
        }
        Ok(bitmap)
    }

    /// Length of the entry in the directory, in bytes: entries are padded to 8 bytes.
    #[must_use]
    pub const fn entry_bytes(&self) -> u64 {
        let bytes = BITMAP_ENTRY_BYTES as u64 + self.extra_data_bytes as u64 + self.name_bytes as u64;
        bytes.next_multiple_of(8)
    }

    /// Length of the bitmap table in bytes.
    #[must_use]
    pub const fn table_bytes(&self) -> u64 {
        self.table_entries as u64 * 8
    }

    /// Guest bytes that its data clusters have bits for.
    #[must_use]
    pub fn coverage(&self, size: ClusterSize) -> u64 {
        let bits = u64::from(self.table_entries).saturating_mul(size.bytes()).saturating_mul(8);
        bits.saturating_mul(1 << self.granularity_bits.min(63))
    }

    /// Entries that its table must have for a virtual disk of `virtual_size` bytes: QEMU opens no image in which a bitmap
    /// that was saved has more or fewer. `None` if its data would be longer than QEMU takes.
    #[must_use]
    pub fn entries_for(&self, virtual_size: u64, size: ClusterSize) -> Option<u32> {
        let bits = virtual_size.div_ceil(1 << self.granularity_bits.min(63));
        let entries = size.count_for(bits.div_ceil(8));
        let bytes = entries.checked_mul(size.bytes())?;
        u32::try_from(entries).ok().filter(|_| bytes <= MAX_DATA)
    }

    /// `flags` as they stand in the directory, with [`in_use`](Self::in_use) as given.
    #[must_use]
    pub const fn flags(&self, in_use: bool) -> u32 {
        let mut flags = 0;
        if in_use {
            flags |= IN_USE;
        }
        if self.auto {
            flags |= AUTO;
        }
        if self.extra_data_compatible {
            flags |= EXTRA_DATA_COMPATIBLE;
        }
        flags
    }

    /// Whether writers have to keep it up: it is enabled, and was saved.
    #[must_use]
    pub const fn is_recording(&self) -> bool {
        self.auto && !self.in_use
    }
}

/// An entry of a bitmap table ("Bitmap table"): where a cluster of bitmap data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// No cluster: all bits are 0.
    Zeroes,
    /// No cluster: all bits are 1.
    Ones,
    /// The bits are in a cluster.
    Data(HostOffset),
}

impl BitmapTableEntry {
    /// Decode an entry.
    ///
    /// # Errors
    /// [`EntryError`] for reserved bits (1 to 8, 56 to 63, and bit 0 beside an offset), and offsets within a cluster.
    pub fn decode(raw: u64, size: ClusterSize) -> Result<Self, EntryError> {
        const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
        let offset = raw & OFFSET_MASK;
        let reserved = raw & !OFFSET_MASK & if offset == 0 { !1 } else { !0 };
        if reserved != 0 {
            return Err(EntryError::Reserved(reserved));
        }
        match (aligned(size, offset)?, raw & 1) {
            (HostOffset(0), 0) => Ok(Self::Zeroes),
            (HostOffset(0), _) => Ok(Self::Ones),
            (offset, _) => Ok(Self::Data(offset)),
        }
    }

    /// The entry as it stands in the table.
    #[must_use]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => 1,
            Self::Data(offset) => offset.0,
        }
    }
}

#[cfg(test)]
#[path = "bitmap_tests.rs"]
mod tests;
