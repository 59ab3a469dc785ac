//! The VHD image format (QEMU's name for it is `vpc`): what both halves of the plugin know of it.
//!
//! Facts come from Microsoft's "Virtual Hard Disk Image Format Specification" 1.0 of 2006 (the section is named at each item)
//! and, where that is silent or not followed, from what Hyper-V, QEMU and XenServer's blktap (`vhd/lib/libvhd.c`) write.
//! Numbers are big-endian. Nothing here does I/O, and nothing here panics on what an image says.
#![no_std]

extern crate alloc;

mod batmap;
mod bitmap;
mod checksum;
mod create;
mod error;
mod footer;
mod footers;
mod geometry;
mod header;
mod locator;
mod parent;

pub use batmap::{BatmapHeader, MapSum, BATMAP_HEADER_BYTES};
pub use bitmap::Bitmap;
pub use create::{create, CreateOptions, NewImage, BAT_OFFSET, DATA_ALIGNMENT, DEFAULT_BLOCK};
pub use error::{FormatError, Trouble};
pub use footer::{creators, Footer, Kind, COOKIE, FOOTER_BYTES, MAX_SECTORS};
pub use footers::Footers;
pub use geometry::Geometry;
pub use header::{Header, HEADER_BYTES, LOCATORS, UNUSED};
pub use locator::{codes, Locator, MAX_LOCATOR_BYTES};
pub use parent::{Name, Parent};

/// Bytes of a sector, the unit of block places and of sector bitmaps ("Sector length is always 512 bytes").
pub const SECTOR: u64 = 512;

/// The big-endian number of four bytes at `at`; 0 past the end of `bytes`.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_be_bytes(*field))
}

/// The big-endian number of eight bytes at `at`; 0 past the end of `bytes`.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u64::from_be_bytes(*field))
}

/// Put `field` at byte `at`; nothing happens if it is not within `bytes`.
fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(field.len())) {
        place.copy_from_slice(field);
    }
}
