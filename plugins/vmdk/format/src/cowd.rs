//! The header of a sparse extent of ESX, `COWDisk_Header` ("ESXi Host Sparse Extents"), little-endian: the delta disks
//! (`vmfsSparse`) that ESX makes of snapshots on VMFS 3 and 5.
//!
//! The directory has an entry of 32 bits for each grain table of 4,096 entries. There is one copy of either, and no entry
//! that says zeroes.

use crate::{FormatError, Layout, SECTOR};
use alloc::format;
use core::ops::Range;

/// `"COWD"`, the first four bytes.
pub const COWD_MAGIC: [u8; 4] = *b"COWD";
/// Bytes of the header that are read: all fields that are used lie in its first sector.
pub const COWD_HEADER_BYTES: usize = 512;
/// Sectors of the whole header: "the COWDisk_Header structure takes four sectors".
const HEADER_SECTORS: u64 = 4;
/// Entries of a grain table.
const TABLE_ENTRIES: u64 = 4096;
/// Largest grain in sectors: 64 MiB, as for a hosted extent.
const MAX_GRAIN: u32 = 1 << 17;
/// Where `freeSector` stands in the file, in bytes.
const FREE_SECTOR_AT: usize = 28;

/// The fields that are used. Offsets and sizes in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CowdHeader {
    /// `numSectors`: size of the disk.
    pub capacity: u32,
    /// `grainSize`: 1 by default.
    pub grain: u32,
    /// `gdOffset`: the grain directory, behind the header.
    pub directory: u32,
    /// `numGDEntries`.
    pub directory_entries: u32,
    /// `freeSector`: where the next grain or table goes. QEMU never changes it when it writes.
    pub next_free: u32,
}

impl CowdHeader {
    /// Take a header apart and look at its values.
    ///
    /// # Errors
    /// A clause about the field that cannot be taken. Version 3 is that of VMware Workstation 3, whose tables are shorter.
    pub fn parse(bytes: &[u8; COWD_HEADER_BYTES]) -> Result<Self, FormatError> {
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != COWD_MAGIC {
            return Err(FormatError::corrupt("the magic is not that of a sparse extent of ESX (COWD)"));
        }
        let header = Self {
            capacity: field(12),
            grain: field(16),
            directory: field(20),
            directory_entries: field(24),
            next_free: field(FREE_SECTOR_AT),
        };
        match (field(4), field(8)) {
            (1, 3) => {}
            (1, flags) => {
                return Err(FormatError::unsupported(format!("flags {flags:#x} of the header are not known")))
            }
            (version, _) => {
                return Err(FormatError::unsupported(format!("version {version} of the header is not known")))
            }
        }
        if header.capacity == 0 {
            return Err(FormatError::corrupt("numSectors is 0, which is no disk's"));
        }
        if !header.grain.is_power_of_two() || header.grain > MAX_GRAIN {
            let text = format!("grainSize is {} sectors, and has to be a power of two up to {MAX_GRAIN}", header.grain);
            return Err(FormatError::corrupt(text));
        }
        if u64::from(header.directory) < HEADER_SECTORS {
            return Err(FormatError::corrupt(format!("gdOffset is {}, which lies in the header", header.directory)));
        }
        let needed = header.layout().directory_entries();
        if u64::from(header.directory_entries) < needed {
            let text = format!("numGDEntries is {}, and the disk needs {needed}", header.directory_entries);
            return Err(FormatError::corrupt(text));
        }
        Ok(header)
    }

    /// Where everything is.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let (directory, entries) = (u64::from(self.directory), u64::from(self.directory_entries));
        let directory_sectors = (entries * 4).div_ceil(SECTOR);
        Layout {
            capacity: self.capacity.into(),
            grain: self.grain.into(),
            table_entries: TABLE_ENTRIES,
            header: HEADER_SECTORS,
            descriptor_offset: 0,
            descriptor_size: 0,
            directory,
            directory_sectors,
            redundant_directory: None,
            overhead: directory + directory_sectors,
            zeroed_grains: false,
            compressed: false,
            next_free: Some(self.next_free.into()),
        }
    }

    /// The bytes of `freeSector` for another value, and where they stand in the file. They lie in one sector, so that a crash
    /// leaves the old number or the new one.
    #[must_use]
    pub fn free_sector(next_free: u32) -> (Range<usize>, [u8; 4]) {
        (FREE_SECTOR_AT..FREE_SECTOR_AT + 4, next_free.to_le_bytes())
    }

    /// The first sector of a header; the rest, which names a parent and describes the disk for ESX 2, is zero.
    #[must_use]
    pub fn encode(&self) -> [u8; COWD_HEADER_BYTES] {
        let mut bytes = [0; COWD_HEADER_BYTES];
        bytes[..4].copy_from_slice(&COWD_MAGIC);
        let fields =
            [1, 3, self.capacity, self.grain, self.directory, self.directory_entries, self.next_free].into_iter();
        for (value, place) in fields.zip(bytes[4..].chunks_exact_mut(4)) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The header of a new delta of 8 GiB.
    fn fresh() -> CowdHeader {
        CowdHeader { capacity: 16_777_216, grain: 1, directory: 4, directory_entries: 4096, next_free: 36 }
    }

    #[test]
    fn a_fresh_delta() {
        let header = CowdHeader::parse(&fresh().encode()).unwrap();
        assert_eq!(header, fresh());
        let layout = header.layout();
        assert_eq!((layout.virtual_size(), layout.grain_bytes(), layout.table_bytes()), (8 << 30, 512, 16384));
        assert_eq!((layout.table_coverage(), layout.directory_entries(), layout.overhead), (2 << 20, 4096, 36));
        assert_eq!(Layout::length_beyond(36 * SECTOR), Some(20480), "whole blocks");
        assert_eq!(Layout::length_beyond(40 * SECTOR), Some(24576), "freeSector has to be less than the length");
        assert_eq!(Layout::length_beyond(u64::MAX - 1), None);
    }

    #[test]
    fn the_largest_disk() {
        let header = CowdHeader { capacity: u32::MAX, directory_entries: 1 << 20, ..fresh() };
        let layout = CowdHeader::parse(&header.encode()).unwrap().layout();
        assert_eq!((layout.directory_entries(), layout.directory_sectors), (1 << 20, 8192));
        assert!(CowdHeader::parse(&CowdHeader { directory_entries: (1 << 20) - 1, ..header }.encode()).is_err());
        let odd = CowdHeader { directory_entries: u32::MAX, directory: u32::MAX, ..header };
        assert_eq!(CowdHeader::parse(&odd.encode()).unwrap().layout().overhead, u64::from(u32::MAX) + (1 << 25));
    }

    #[test]
    fn what_cannot_be_taken_is_named() {
        let with = |at: usize, value: u32| {
            let mut bytes = fresh().encode();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            CowdHeader::parse(&bytes).unwrap_err().text
        };
        for (at, value, words) in [
            (0, 0, "magic"),
            (4, 3, "version 3"),
            (8, 0x1b, "flags 0x1b"),
            (12, 0, "numSectors"),
            (16, 0, "grainSize is 0"),
            (16, 3, "grainSize is 3"),
            (16, 1 << 18, "grainSize"),
            (20, 3, "gdOffset is 3"),
            (24, 4095, "numGDEntries is 4095, and the disk needs 4096"),
        ] {
            assert!(with(at, value).contains(words), "{at} {value}: {}", with(at, value));
        }
    }

    #[test]
    fn the_free_sector_is_replaced_within_the_first_sector() {
        let mut bytes = fresh().encode();
        let (range, digits) = CowdHeader::free_sector(0x0102_0304);
        bytes[range].copy_from_slice(&digits);
        let header = CowdHeader::parse(&bytes).unwrap();
        assert_eq!(header, CowdHeader { next_free: 0x0102_0304, ..fresh() });
    }
}
