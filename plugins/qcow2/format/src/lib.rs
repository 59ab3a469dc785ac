//! The qcow2 image format: what both halves of the plugin know of it.
//!
//! Facts come from the qcow2 specification (QEMU, `docs/interop/qcow2`); each item names its section.
//! Nothing here does I/O, and nothing here panics on what an image says.
#![no_std]

extern crate alloc;

mod bitmap;
mod compressed;
mod compressor;
mod create;
mod encryption;
mod error;
mod extension;
mod header;
mod measure;
mod parent;
mod refcount;
mod snapshot;
mod snapshot_details;
mod subcluster;
mod table;
mod types;

pub use bitmap::{
    Bitmap, BitmapError, BitmapTableEntry, BITMAP_ENTRY_BYTES, BITMAP_FLAGS_FIELD, BITMAP_TABLE_SIZE_FIELD,
};
pub use compressed::{decompress, CompressedRange, DecodeError, Decompressor};
pub use compressor::Compressor;
pub use create::{create, CreateError, CreateOptions, NewImage, Preallocation};
pub use encryption::{encryption_method, encryption_refusal};
pub use error::{HeaderError, HeaderErrorKind};
pub use extension::{Bitmaps, Extension, ExtensionKind, FeatureName};
pub use header::{
    autoclear, compatible, header_bytes_needed, incompatible, CompressionType, Header, Version, AUTOCLEAR_OFFSET,
    INCOMPATIBLE_OFFSET, L1_SIZE_FIELD, MAGIC, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, REFCOUNT_TABLE_FIELD,
    VIRTUAL_SIZE_FIELD,
};
pub use measure::{measure, measure_bitmaps, Measure};
pub use parent::{parent_steps, Steps, SECTOR};
pub use refcount::{get_refcount, set_refcount, RefcountOrder};
pub use snapshot::Snapshot;
pub use snapshot_details::SnapshotDetails;
pub use subcluster::{Subclusters, SUBCLUSTERS};
pub use table::{EntryError, L1Entry, L2Entry, RefcountTableEntry, COPIED};
pub use types::{ClusterSize, GuestCluster, GuestOffset, HostCluster, HostOffset};
