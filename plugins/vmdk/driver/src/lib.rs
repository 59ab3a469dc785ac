//! The guest half of the vmdk plugin: disks of hosted sparse extents, of those of ESX, and of
//! flat ones, as source and as sink; disks of seSparse extents, as source.
#![no_std]

extern crate alloc;

mod check;
mod content_id;
mod copies;
mod decode;
mod disk;
mod failures;
mod grow;
mod growth;
mod image;
mod mend;
mod parent;
mod sesparse;
mod sesparse_check;
mod sink;
mod source;
mod sparse_grow;
mod sparse_plan;
mod sparse_sink;
mod sparse_source;
mod stream_sink;
mod tables;
mod work;

pub use sink::VmdkSink;
pub use source::VmdkSource;

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The vmdk format.
pub struct Vmdk;

impl FormatDriver for Vmdk {
    type Source = VmdkSource;
    type Sink = VmdkSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<VmdkSource> {
        VmdkSource::new(disk::Disk::open(io, device, ErrorCode::OverlayCorrupt)?)
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<VmdkSink> {
        VmdkSink::new(disk::Disk::open(io, device, ErrorCode::BackingCorrupt)?, device, has_backing)
    }
}
