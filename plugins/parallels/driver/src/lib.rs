//! The guest half of the parallels plugin: expandable images, as source and as sink.
#![no_std]

extern crate alloc;

mod check;
mod grow;
mod image;
mod mark;
mod mend;
mod sink;
mod slots;
mod source;
mod survey;
mod write;

pub use sink::ParallelsSink;
pub use source::ParallelsSource;

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The Parallels format.
pub struct Parallels;

impl FormatDriver for Parallels {
    type Source = ParallelsSource;
    type Sink = ParallelsSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<ParallelsSource> {
        Ok(ParallelsSource::new(image::Image::open(io, device, ErrorCode::OverlayCorrupt)?, device))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<ParallelsSink> {
        ParallelsSink::new(image::Image::open(io, device, ErrorCode::BackingCorrupt)?, device, has_backing)
    }
}
