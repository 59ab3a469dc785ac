//! The VHDX image format: what both halves of the plugin know of it.
//!
//! Facts come from Microsoft's \[MS-VHDX\] "Virtual Hard Disk v2 (VHDX) File Format", revision 8.0; the section is named at each
//! item. Numbers are little-endian. Nothing here does I/O of its own, and nothing here panics on what an image says.
#![no_std]

extern crate alloc;

mod active;
mod bits;
mod crc;
mod create;
mod entry;
mod error;
mod guid;
mod header;
mod layout;
mod lineage;
mod locator;
mod log_entry;
mod metadata;
mod open;
mod regions;
mod replay;

pub use active::active_sequence;
pub use bits::Bits;
pub use create::{create, CreateOptions, NewImage, DEFAULT_BLOCK, DEFAULT_CHILD_BLOCK};
pub use entry::{Entry, State};
pub use error::{FormatError, LoadError, Read, Trouble};
pub use guid::{Guid, GUID_TEXT_BYTES};
pub use header::{Header, Headers, HEADER_BYTES, HEADER_OFFSETS, SIGNATURE};
pub use layout::Layout;
pub use lineage::{Lineage, Record};
pub use locator::{keys, Locator, Parent, Text};
pub use log_entry::{LogEntry, NewEntry, Update, LOG_SECTOR, PAGES_PER_ENTRY};
pub use metadata::{items, Item, Metadata, TABLE_BYTES};
pub use open::{Opened, MAX_REPLAYED_LOG};
pub use regions::{ids, Region, RegionTable, REGION_TABLE_BYTES, REGION_TABLE_OFFSETS};
pub use replay::Replay;

/// What everything behind the header section is aligned to in the file, in bytes (2.1).
pub const ALIGNMENT: u64 = 1 << 20;
/// Bytes of a sector bitmap block (2.4).
pub const BITMAP_BLOCK: u64 = 1 << 20;
/// Longest file that is looked at, in bytes: a disk of 64 TiB, the largest, needs little more than half.
pub const LONGEST_FILE: u64 = 128 << 40;
/// Most bytes of a disk (2.6.2.2).
pub const MAX_SIZE: u64 = 64 << 40;

/// The number of two bytes at `at`; 0 past the end.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u16::from_le_bytes(*field))
}

/// The number of four bytes at `at`; 0 past the end.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_le_bytes(*field))
}

/// The number of eight bytes at `at`; 0 past the end.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u64::from_le_bytes(*field))
}

/// Put `field` at `at`, if there is room for it.
fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(field.len())) {
        place.copy_from_slice(field);
    }
}
