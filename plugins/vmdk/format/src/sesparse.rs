//! The headers and entries of a space-efficient sparse extent (`seSparse`), little-endian: the delta disks that ESXi makes
//! of snapshots on VMFS 6.
//!
//! VMware documents nothing of it. What is here is what QEMU reads (`block/vmdk.c`: `VMDKSESparseConstHeader`,
//! `VMDKSESparseVolatileHeader`, `get_cluster_offset`), with the same strictness; journal, free bitmap and back map are
//! known by their places only, so nothing is ever written.

use crate::{FormatError, SECTOR};
use alloc::format;

/// The first eight bytes, a number of 64 bits.
pub const SESPARSE_MAGIC: [u8; 8] = 0xcafe_babe_u64.to_le_bytes();
/// Bytes of either header.
pub const SESPARSE_HEADER_BYTES: usize = 512;
/// Bytes of a grain: "grain size", 8 sectors, is the only one that is known.
pub const SESPARSE_GRAIN_BYTES: u64 = 8 * SECTOR;
/// Bytes of a grain table: 64 sectors is the only size that is known.
pub const SESPARSE_TABLE_BYTES: u64 = 64 * SECTOR;
/// Entries of a grain table, of 64 bits each.
pub const SESPARSE_TABLE_ENTRIES: u64 = SESPARSE_TABLE_BYTES / 8;
/// Guest bytes that one grain table stands for: 16 MiB.
pub const SESPARSE_COVERAGE: u64 = SESPARSE_TABLE_ENTRIES * SESPARSE_GRAIN_BYTES;
/// A table's number is less: no disk needs more tables.
pub const SESPARSE_MAX_TABLES: u64 = 1 << 22;
/// Size of the largest disk in sectors: 64 TiB, the most that ESXi has.
const MAX_CAPACITY: u64 = 1 << 37;
/// The only version that is known, 2.1.
const VERSION: u64 = 0x0000_0002_0000_0001;
/// First field of the volatile header.
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// Number of fields of the constant header; the rest of its sector is zero.
const FIELDS: usize = 26;

/// A part of the file, in sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Its first sector.
    pub offset: u64,
    /// Its length.
    pub size: u64,
}

impl Region {
    /// First byte and length in bytes, if it lies within a file of `length` bytes.
    #[must_use]
    pub fn within(&self, length: u64) -> Option<(u64, u64)> {
        let (start, size) = (self.offset.checked_mul(SECTOR)?, self.size.checked_mul(SECTOR)?);
        start.checked_add(size).filter(|&end| end <= length).map(|_| (start, size))
    }
}

/// The fields of the constant header that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeSparseHeader {
    /// Size of the disk in sectors.
    pub capacity: u64,
    /// The volatile header.
    pub volatile: Region,
    /// The grain directory: entries of 64 bits.
    pub directory: Region,
    /// The grain tables, which the directory numbers.
    pub tables: Region,
    /// The grains, which the tables number.
    pub grains: Region,
}

/// The fields of a header of 64-bit numbers.
fn fields(bytes: &[u8; SESPARSE_HEADER_BYTES]) -> [u64; SESPARSE_HEADER_BYTES / 8] {
    let mut fields = [0; SESPARSE_HEADER_BYTES / 8];
    fields.iter_mut().zip(sesparse_entries(bytes)).for_each(|(field, number)| *field = number);
    fields
}

/// The entries of a grain directory or table, of 64 bits each.
pub fn sesparse_entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|raw| {
        let mut number = [0; 8];
        number.copy_from_slice(raw);
        u64::from_le_bytes(number)
    })
}

impl SeSparseHeader {
    /// Take a constant header apart and look at its values.
    ///
    /// # Errors
    /// A clause about the field that cannot be taken: anything but what is known is not supported.
    pub fn parse(bytes: &[u8; SESPARSE_HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..8] != SESPARSE_MAGIC {
            return Err(FormatError::corrupt("the magic is not that of a seSparse extent"));
        }
        let fields = fields(bytes);
        let known = [
            (1, VERSION, "version"),
            (3, SESPARSE_GRAIN_BYTES / SECTOR, "the grain size"),
            (4, SESPARSE_TABLE_BYTES / SECTOR, "the grain table size"),
            (5, 0, "flags"),
        ];
        for (field, value, name) in known {
            if fields[field] != value {
                let text =
                    format!("{name} of the seSparse header is {:#x}, and only {value:#x} is known", fields[field]);
                return Err(FormatError::unsupported(text));
            }
        }
        if fields[6..10].iter().chain(&fields[FIELDS..]).any(|&field| field != 0) {
            return Err(FormatError::unsupported("reserved fields of the seSparse header are in use"));
        }
        let region = |field: usize| Region { offset: fields[field], size: fields[field + 1] };
        let header = Self {
            capacity: fields[2],
            volatile: region(10),
            directory: region(16),
            tables: region(18),
            grains: region(24),
        };
        if header.capacity == 0 || header.capacity > MAX_CAPACITY {
            return Err(FormatError::unsupported(format!("the capacity of {} sectors is no disk's", header.capacity)));
        }
        let needed = header.directory_entries().saturating_mul(8).div_ceil(SECTOR);
        if header.directory.size < needed {
            let text = format!("the grain directory has {} sectors, and needs {needed}", header.directory.size);
            return Err(FormatError::corrupt(text));
        }
        Ok(header)
    }

    /// Look at the values of the volatile header.
    ///
    /// # Errors
    /// When its journal has to be replayed first, which nobody but ESXi can, and when it is none.
    pub fn check_volatile(bytes: &[u8; SESPARSE_HEADER_BYTES]) -> Result<(), FormatError> {
        let fields = fields(bytes);
        if fields[0] != VOLATILE_MAGIC {
            return Err(FormatError::corrupt("the volatile header of the seSparse extent has another magic"));
        }
        if fields[3] != 0 {
            return Err(FormatError::unsupported(
                "the seSparse extent was not closed, and only ESXi can replay its journal: open and close it there",
            ));
        }
        if fields[4..].iter().any(|&field| field != 0) {
            return Err(FormatError::unsupported("reserved fields of the volatile seSparse header are in use"));
        }
        Ok(())
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub const fn virtual_size(&self) -> u64 {
        self.capacity.saturating_mul(SECTOR)
    }

    /// Entries of the grain directory that stand for a part of the disk.
    #[must_use]
    pub const fn directory_entries(&self) -> u64 {
        self.virtual_size().div_ceil(SESPARSE_COVERAGE)
    }

    /// Where the table with this number begins in a file of `length` bytes; `None` if it does not lie in that.
    #[must_use]
    pub fn table_at(&self, number: u64, length: u64) -> Option<u64> {
        let start = self.tables.offset.checked_mul(SECTOR)?.checked_add(number.checked_mul(SESPARSE_TABLE_BYTES)?)?;
        let inside = start.checked_add(SESPARSE_TABLE_BYTES)? <= length;
        Some(start).filter(|_| inside && number < SESPARSE_MAX_TABLES)
    }

    /// Where the grain with this number begins in a file of `length` bytes, if it does. It may have been cut short.
    #[must_use]
    pub fn grain_at(&self, number: u64, length: u64) -> Option<u64> {
        let start = self.grains.offset.checked_mul(SECTOR)?.checked_add(number.checked_mul(SESPARSE_GRAIN_BYTES)?)?;
        Some(start).filter(|&start| start < length)
    }
}

/// The number of the table that an entry of the directory names; `None` for no table.
///
/// # Errors
/// For any other type of entry: the upper half of one is 0x10000000.
pub fn sesparse_table(entry: u64) -> Result<Option<u64>, FormatError> {
    match (entry, entry >> 32) {
        (0, _) => Ok(None),
        (_, 0x1000_0000) => Ok(Some(entry & 0xffff_ffff)),
        _ => Err(FormatError::corrupt(format!("the entry {entry:#x} of the grain directory has no meaning"))),
    }
}

/// What an entry of a seSparse grain table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeGrain {
    /// Nothing: what is below shows.
    Absent,
    /// Zeroes, either unmapped by the guest or written by it.
    Zero,
    /// The grain with this number.
    Number(u64),
}

impl SeGrain {
    /// The meaning of an entry: its type is in the upper four bits. Of a grain's number, bits 48 to 59 are the lower twelve
    /// bits, and bits 0 to 47 the rest.
    ///
    /// # Errors
    /// For a type that is not known.
    pub fn decode(entry: u64) -> Result<Self, FormatError> {
        match (entry, entry >> 60) {
            (0, _) => Ok(Self::Absent),
            (_, 1 | 2) => Ok(Self::Zero),
            (_, 3) => Ok(Self::Number((entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12)),
            _ => Err(FormatError::corrupt(format!("the entry {entry:#x} of a grain table has no meaning"))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn header() -> [u64; 64] {
        let mut fields = [0; 64];
        let values = [
            0xcafe_babe,
            VERSION,
            40_000,
            8,
            64,
            0,
            0,
            0,
            0,
            0,
            1,
            1,
            2,
            1,
            8,
            8,
            16,
            1,
            64,
            128,
            192,
            8,
            200,
            8,
            256,
            800,
        ];
        fields[..26].copy_from_slice(&values);
        fields
    }

    fn bytes(fields: &[u64; 64]) -> [u8; SESPARSE_HEADER_BYTES] {
        let mut bytes = [0; SESPARSE_HEADER_BYTES];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn what_esxi_writes() {
        let header = SeSparseHeader::parse(&bytes(&header())).unwrap();
        assert_eq!((header.virtual_size(), header.directory_entries()), (40_000 * 512, 2));
        let tables = header.tables.offset * SECTOR;
        assert_eq!(header.table_at(1, tables + 2 * SESPARSE_TABLE_BYTES), Some(tables + SESPARSE_TABLE_BYTES));
        assert_eq!(header.table_at(1, tables + 2 * SESPARSE_TABLE_BYTES - 1), None);
        assert_eq!([SESPARSE_MAX_TABLES, u64::MAX].map(|number| header.table_at(number, u64::MAX)), [None, None]);
        let grains = header.grains.offset * SECTOR;
        assert_eq!(header.grain_at(3, grains + 12289), Some(grains + 12288));
        assert_eq!((header.grain_at(3, grains + 12288), header.grain_at(u64::MAX, u64::MAX)), (None, None));
        assert_eq!(header.grains, Region { offset: 256, size: 800 });
        assert_eq!(header.volatile.within(1024), Some((512, 512)));
        assert_eq!(header.volatile.within(1023), None);
        assert_eq!(Region { offset: u64::MAX, size: 1 }.within(u64::MAX), None);
    }

    #[test]
    fn what_cannot_be_taken_is_named() {
        for (field, value, words) in [
            (0, 0xcafe_babf, "magic"),
            (1, 1, "version"),
            (2, 0, "capacity"),
            (2, u64::MAX, "capacity"),
            (2, 1 << 32, "needs"),
            (3, 16, "the grain size"),
            (4, 32, "the grain table size"),
            (5, 1, "flags"),
            (9, 1, "reserved"),
            (26, 1, "reserved"),
            (63, 1, "reserved"),
        ] {
            let mut fields = header();
            fields[field] = value;
            let error = SeSparseHeader::parse(&bytes(&fields)).unwrap_err();
            assert!(error.text.contains(words), "{field}: {}", error.text);
        }
    }

    #[test]
    fn a_volatile_header_whose_journal_is_done() {
        let check = |fields: &[u64]| {
            let mut all = [0; 64];
            all[..fields.len()].copy_from_slice(fields);
            SeSparseHeader::check_volatile(&bytes(&all)).map_err(|error| error.text)
        };
        assert_eq!(check(&[VOLATILE_MAGIC, 5, 77, 0]), Ok(()));
        assert!(check(&[VOLATILE_MAGIC, 5, 77, 1]).unwrap_err().contains("journal"));
        assert!(check(&[1, 5, 77, 0]).unwrap_err().contains("magic"));
        assert!(check(&[VOLATILE_MAGIC, 5, 77, 0, 1]).unwrap_err().contains("reserved"));
    }

    #[test]
    fn entries() {
        assert_eq!(sesparse_table(0), Ok(None));
        assert_eq!(sesparse_table(0x1000_0000_0000_0007), Ok(Some(7)));
        for wrong in [7, 0x1000_0001_0000_0007, 0x2000_0000_0000_0007] {
            assert!(sesparse_table(wrong).is_err());
        }
        assert_eq!(SeGrain::decode(0), Ok(SeGrain::Absent));
        assert_eq!(SeGrain::decode(0x1000_0000_0000_0000), Ok(SeGrain::Zero));
        assert_eq!(SeGrain::decode(0x2000_0000_0000_0009), Ok(SeGrain::Zero));
        assert_eq!(SeGrain::decode(0x3000_0000_0000_0000), Ok(SeGrain::Number(0)));
        assert_eq!(SeGrain::decode(0x3abc_0000_0000_0001), Ok(SeGrain::Number(0x1abc)));
        for wrong in [1, 0x4000_0000_0000_0000, u64::MAX] {
            assert!(SeGrain::decode(wrong).is_err());
        }
    }
}
