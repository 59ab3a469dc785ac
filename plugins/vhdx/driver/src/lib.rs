//! The guest half of the vhdx plugin: fixed, dynamic and differencing disks, as source and as sink.
#![no_std]

extern crate alloc;

mod check;
mod empty;
mod extents;
mod follow;
mod group;
mod grow;
mod growth;
mod image;
mod journal;
mod lookup;
mod mend;
mod pages;
mod parent;
mod session;
mod sink;
mod source;
mod table;
mod verify;
mod write;

pub use sink::VhdxSink;
pub use source::VhdxSource;

use image::Image;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The VHDX format.
pub struct Vhdx;

impl FormatDriver for Vhdx {
    type Source = VhdxSource;
    type Sink = VhdxSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<VhdxSource> {
        Ok(VhdxSource::new(Image::open(io, device, ErrorCode::OverlayCorrupt)?, device))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<VhdxSink> {
        VhdxSink::new(Image::open(io, device, ErrorCode::BackingCorrupt)?, device)
    }
}
