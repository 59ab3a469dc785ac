//! The qcow image format, version 1: what both halves of the plugin know of it.
//!
//! There is no specification in prose. QEMU's `block/qcow.c` describes the format: the structure `QCowHeader`, what
//! `qcow_open` accepts, what `qcow_co_create` makes, and how `get_cluster_offset` and `decompress_cluster` use entries. All
//! numbers are big-endian. Nothing here does I/O, and nothing here panics on what an image says.
#![no_std]

extern crate alloc;

mod create;
mod entry;
mod error;
mod header;
mod inflate;

pub use create::{create, l1_place, CreateOptions, NewImage};
pub use entry::{Entry, ENTRY_BYTES};
pub use error::{FormatError, Trouble};
pub use header::{field, Header, ENCRYPTED, HEADER_BYTES, MAGIC, MAX_NAME, MOST_L1_ENTRIES};
pub use inflate::{inflate, Inflater};

/// Bytes of a sector, in which the disk and what lies in the file are counted (`BDRV_SECTOR_SIZE`).
pub const SECTOR: u64 = 512;
