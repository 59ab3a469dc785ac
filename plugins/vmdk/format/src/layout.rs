//! Where a sparse extent keeps what, in the terms that hosted extents ("Hosted sparse extents") and those of ESX ("ESXi Host
//! Sparse Extents") have in common: a directory of tables, tables of grains, entries of 32 bits that are numbers of sectors.

use crate::{Grain, GrainMarker, METADATA_MARKER_BYTES, SECTOR};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// A piece of metadata: its sectors, and what it is.
pub type Metadata = (Range<u64>, &'static str);

/// Where a guest byte is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The index of its grain table in the directory.
    pub table: usize,
    /// The index of its entry in the table.
    pub entry: usize,
    /// The first guest byte of its grain.
    pub grain: u64,
}

/// What the header of a sparse extent comes to. Offsets and sizes are in sectors, unless they say bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Size of the disk.
    pub capacity: u64,
    /// Size of a grain, at least 1.
    pub grain: u64,
    /// Entries of a grain table.
    pub table_entries: u64,
    /// Length of the header.
    pub header: u64,
    /// Where the embedded descriptor begins; 0 if there is none.
    pub descriptor_offset: u64,
    /// Length of the embedded descriptor.
    pub descriptor_size: u64,
    /// Where the grain directory begins.
    pub directory: u64,
    /// Length of the directory as the header has it, which may be more than its [entries](Self::directory_entries) take.
    pub directory_sectors: u64,
    /// Where the second directory begins, if there is one.
    pub redundant_directory: Option<u64>,
    /// Where grains may begin.
    pub overhead: u64,
    /// Entry 1 of a grain table means a grain of zeroes.
    pub zeroed_grains: bool,
    /// Grains are compressed.
    pub compressed: bool,
    /// The first free sector, of an extent of ESX, whose header has such a field.
    pub next_free: Option<u64>,
}

impl Layout {
    /// Size of the disk in bytes. Headers are refused whose capacity would be more than 2^63 bytes.
    #[must_use]
    pub const fn virtual_size(&self) -> u64 {
        self.capacity.saturating_mul(SECTOR)
    }

    /// Bytes of a grain.
    #[must_use]
    pub const fn grain_bytes(&self) -> u64 {
        self.grain.saturating_mul(SECTOR)
    }

    /// Bytes of a grain table: whole sectors.
    #[must_use]
    pub const fn table_bytes(&self) -> u64 {
        self.table_entries.saturating_mul(4)
    }

    /// Guest bytes that one grain table stands for.
    #[must_use]
    pub const fn table_coverage(&self) -> u64 {
        self.grain_bytes().saturating_mul(self.table_entries)
    }

    /// Entries of the grain directory that stand for a part of the disk, one for each grain table.
    #[must_use]
    pub const fn directory_entries(&self) -> u64 {
        match self.table_coverage() {
            0 => 0,
            coverage => self.virtual_size().div_ceil(coverage),
        }
    }

    /// Where a guest byte is looked up. One past the end of the disk has a table that no directory has.
    #[must_use]
    pub fn place(&self, guest: u64) -> Place {
        let grain = guest / self.grain_bytes().max(1);
        let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let entries = self.table_entries.max(1);
        let (table, entry) = (index(grain / entries), index(grain % entries));
        Place { table, entry, grain: grain.saturating_mul(self.grain_bytes()) }
    }

    /// The first guest byte of an entry, which may lie past the end of the disk.
    #[must_use]
    pub const fn guest_of(&self, table: usize, entry: usize) -> u64 {
        let grain = (table as u64).saturating_mul(self.table_entries).saturating_add(entry as u64);
        grain.saturating_mul(self.grain_bytes())
    }

    /// Everything but grains, their tables and the footer.
    #[must_use]
    pub fn fixed_metadata(&self) -> Vec<Metadata> {
        let at = |sector: u64, length: u64| sector..sector.saturating_add(length);
        let mut parts = vec![
            (0..self.header, "header"),
            (at(self.descriptor_offset, self.descriptor_size), "descriptor"),
            (at(self.directory, self.directory_sectors), "grain directory"),
        ];
        let redundant = self.redundant_directory.map(|sector| at(sector, self.directory_sectors));
        parts.extend(redundant.map(|sectors| (sectors, "redundant grain directory")));
        // An extent of several has no descriptor.
        parts.retain(|(sectors, _)| !sectors.is_empty());
        parts
    }

    /// The meaning of an entry of a grain table.
    #[must_use]
    pub fn grain_of(&self, entry: u32) -> Grain {
        Grain::decode(entry, self.zeroed_grains)
    }

    /// What new grains begin at a multiple of, in bytes: their size, and compressed ones at any sector.
    #[must_use]
    pub const fn alignment(&self) -> u64 {
        if self.compressed {
            SECTOR
        } else {
            self.grain_bytes()
        }
    }

    /// Bytes of the file that a new grain takes at most.
    #[must_use]
    pub const fn new_grain_bytes(&self) -> u64 {
        if self.compressed {
            GrainMarker::longest(self.grain_bytes())
        } else {
            self.grain_bytes()
        }
    }

    /// Bytes of the marker in front of a new grain table.
    #[must_use]
    pub const fn table_marker_bytes(&self) -> u64 {
        if self.compressed {
            METADATA_MARKER_BYTES
        } else {
            0
        }
    }

    /// The length in bytes of a file in which everything up to byte `end` is in use; `None` past the longest.
    #[must_use]
    pub const fn file_length(&self, end: u64) -> Option<u64> {
        if self.next_free.is_some() {
            Self::length_beyond(end)
        } else {
            Some(end)
        }
    }

    /// The length in bytes that an extent of ESX has when the first free sector is at byte `next_free`: "This needs to be
    /// less than the length of the delta link" (`freeSector`). Such files are whole blocks of 4 KiB, as VMware's are wherever they
    /// are listed.
    #[must_use]
    pub const fn length_beyond(next_free: u64) -> Option<u64> {
        match next_free.checked_add(1) {
            Some(end) => end.checked_next_multiple_of(FILE_BLOCK),
            None => None,
        }
    }
}

/// What the length of a delta file is a multiple of, in bytes.
const FILE_BLOCK: u64 = 4096;
