//! The VDI image format of VirtualBox: what both halves of the plugin know of it.
//!
//! There is no specification in prose. Facts come from VirtualBox's own source, `src/VBox/Storage/VDICore.h` (the
//! structures) and `src/VBox/Storage/VDI.cpp` (the function is named at each item), and from what QEMU's `block/vdi.c`
//! takes. Nothing here does I/O, and nothing here panics on what an image says.
#![no_std]

extern crate alloc;

mod create;
mod entry;
mod error;
mod header;
mod uuid;

pub use create::{create, data_offset_of, CreateOptions, NewImage, MAX_NEW_BLOCKS, NEW_BLOCK_BYTES};
pub use entry::{Entry, ENTRY_BYTES};
pub use error::{FormatError, Trouble};
pub use header::{field, Header, ImageType, HEADER_BYTES, IDENTITY_BYTES, SIGNATURE, SIGNATURE_OFFSET};
pub use uuid::{Uuid, UUID_BYTES};

/// Bytes of a sector (`VDI_GEOMETRY_SECTOR_SIZE`): the only size that VirtualBox and QEMU take.
pub const SECTOR: u64 = 512;
