//! The guest half of the VDI plugin: dynamic, static and differencing images, as source and as sink.
#![no_std]

extern crate alloc;

mod grow;
mod growth;
mod image;
mod map;
mod mend;
mod parent;
mod relocate;
mod sink;
mod slots;
mod source;
mod survey;
mod write;

pub use sink::VdiSink;
pub use source::VdiSource;

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The VDI format.
pub struct Vdi;

impl FormatDriver for Vdi {
    type Source = VdiSource;
    type Sink = VdiSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<VdiSource> {
        Ok(VdiSource::new(image::Image::open(io, device, ErrorCode::OverlayCorrupt)?, device))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<VdiSink> {
        VdiSink::new(image::Image::open(io, device, ErrorCode::BackingCorrupt)?, device, has_backing)
    }
}
