//! The VMDK image format: what both halves of the plugin know of it.
//!
//! Facts come from VMware's "Virtual Disk Format 5.0" (the section is named at each item) and, where that is silent, from
//! what QEMU and VMware write. Nothing here does I/O, and nothing here panics on what an image says.
#![no_std]

extern crate alloc;

mod compressed;
mod cowd;
mod create;
mod descriptor;
mod error;
mod extent;
mod grow;
mod header;
mod layout;
mod parent;
mod sesparse;
mod stream;

pub use compressed::{Compressor, Decompressor, GrainError};
pub use cowd::{CowdHeader, COWD_HEADER_BYTES, COWD_MAGIC};
pub use create::{create, CreateOptions, NewDisk, NewFile, NewImage, Subformat, NEW_GRAIN_BYTES};
pub use descriptor::{next_content_id, ContentId, Descriptor, NO_PARENT};
pub use error::{FormatError, Trouble};
pub use extent::{DiskExtent, ExtentLine, Storage};
pub use grow::{change_size, grow_header, NewSize};
pub use header::{
    flags, Header, HeaderGrowth, HEADER_BYTES, MAGIC, MAX_DESCRIPTOR_BYTES, MAX_DIRECTORY, UNCLEAN_SHUTDOWN,
};
pub use layout::{Layout, Metadata, Place};
pub use parent::{change_parent, Embedded, Step};
pub use sesparse::{
    sesparse_entries, sesparse_table, Region, SeGrain, SeSparseHeader, SESPARSE_COVERAGE, SESPARSE_GRAIN_BYTES,
    SESPARSE_HEADER_BYTES, SESPARSE_MAGIC, SESPARSE_MAX_TABLES, SESPARSE_TABLE_BYTES, SESPARSE_TABLE_ENTRIES,
};
pub use stream::{table_marker, GrainMarker, FOOTER_BYTES, METADATA_MARKER_BYTES};

/// Bytes of a sector, the unit of all offsets and sizes in a VMDK ("Basic concepts").
pub const SECTOR: u64 = 512;
/// Entries of a grain table, as the header's field has them ("Hosted sparse extents": always 512).
pub const TABLE_ENTRIES_FIELD: u32 = 512;
/// Entries of a grain table.
pub const TABLE_ENTRIES: u64 = TABLE_ENTRIES_FIELD as u64;
/// Bytes of a grain table.
pub const TABLE_BYTES: u64 = TABLE_ENTRIES * 4;

/// The entries of a grain directory or table, of 32 bits each.
pub fn entries(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]))
}

/// What an entry of a grain table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// Nothing: what is below shows.
    Absent,
    /// Zeroes, without a place in the file.
    Zero,
    /// The grain begins at this byte of the file.
    At(u64),
}

impl Grain {
    /// The meaning of an entry. Entry 1 means zeroes only where the header's flag `ZEROED_GRAINS` says so; it is sector 1
    /// otherwise, which no grain can be at.
    #[must_use]
    pub fn decode(entry: u32, zeroed_grains: bool) -> Self {
        match entry {
            0 => Self::Absent,
            1 if zeroed_grains => Self::Zero,
            sector => Self::At(u64::from(sector) * SECTOR),
        }
    }

    /// The first byte in the file of a grain that has a place.
    #[must_use]
    pub const fn offset(self) -> Option<u64> {
        match self {
            Self::At(offset) => Some(offset),
            Self::Absent | Self::Zero => None,
        }
    }
}
