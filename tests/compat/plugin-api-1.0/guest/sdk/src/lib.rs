//! The library that a format driver links to run inside the instar guest.
//!
//! A driver implements [`Source`] and [`Sink`] over [`BlockIo`], as an ordinary `no_std` library. The same
//! code runs in two places: in host tests over in-memory devices, and in the guest, where the feature
//! `guest` adds entry point, heap, panic handler and memory routines ([`runtime`]) around it.
#![no_std]

extern crate alloc;

mod background;
mod batch;
mod bitmap;
mod bitmaps;
#[cfg(feature = "memory")]
mod change;
pub mod commit;
#[cfg(feature = "memory")]
pub mod conformance;
#[cfg(feature = "memory")]
pub mod crash;
mod crew;
mod decode_ahead;
mod decoded;
mod error;
mod extent;
mod extents;
pub mod ffi;
#[cfg(feature = "memory")]
mod held;
mod holes;
mod io;
mod last_cluster;
#[cfg(feature = "memory")]
pub mod memory;
mod message;
mod ordered;
mod parent;
#[cfg(feature = "memory")]
pub mod random;
pub mod rebase;
mod relink;
pub mod resize;
pub mod runtime;
pub mod table;
mod traits;

pub use background::Background;
pub use batch::Batch;
pub use bitmap::{check_dirty, Bitmap, DirtyRanges};
pub use bitmaps::{Fate, MergedBitmap, Skipped};
pub use crew::Crew;
pub use decode_ahead::{DecodeAhead, Decoder};
pub use error::{overflow, DriverError, DriverResult};
pub use extent::{checked_end, Content, Extent};
pub use extents::{check_extents, Extents};
pub use holes::Holes;
pub use instar_guest_abi as abi;
pub use io::{BlockIo, IoFailure};
pub use last_cluster::LastCluster;
#[doc(hidden)]
pub use message::log_line;
pub use ordered::OrderedWriter;
pub use parent::Parent;
pub use relink::{OpenSource, Relinked, Relinks};
pub use traits::{FormatDriver, NoSink, NoSource, ReadBelow, Sink, Source};
