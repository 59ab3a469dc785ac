//! Parallels expandable images (QEMU's `docs/interop/parallels.txt`, "the specification" below), for both halves of the plugin.
#![no_std]

extern crate alloc;

mod create;
mod error;
mod extension;
mod header;

pub use create::{create, CreateOptions, NewImage, DEFAULT_CLUSTER, LARGEST_CLUSTER};
pub use error::{FormatError, Trouble};
pub use extension::{checksum, Extension, Section, DIRTY_BITMAP, EXTENSION_HEAD, EXTENSION_MAGIC};
pub use header::{field, Header, InUse, Variant, HEADER_BYTES, MOST_ENTRIES, MOST_TRACKS};

/// Bytes of a sector, in which the header counts.
pub const SECTOR: u64 = 512;
/// Bytes of an entry of the BAT.
pub const ENTRY_BYTES: u64 = 4;
