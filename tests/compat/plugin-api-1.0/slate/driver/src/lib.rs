//! The guest half of the slate plugin: both roles, with every callback that module interface 1.0 has but `grow`. The
//! header is for both halves.
#![no_std]

extern crate alloc;

pub mod header;
mod image;
mod sink;
mod source;

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The slate format.
pub struct Slate;

impl FormatDriver for Slate {
    type Source = source::SlateSource;
    type Sink = sink::SlateSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Self::Source> {
        Ok(source::SlateSource(image::Image::open(io, device, ErrorCode::OverlayCorrupt)?))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<Self::Sink> {
        Ok(sink::SlateSink::new(image::Image::open(io, device, ErrorCode::BackingCorrupt)?, device))
    }
}
