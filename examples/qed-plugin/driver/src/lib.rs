//! The guest half of the QED plugin: source and sink over block requests. The header is for both halves.
#![no_std]

extern crate alloc;

pub mod header;
mod image;
mod sink;
mod source;

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The QED format.
pub struct Qed;

impl FormatDriver for Qed {
    type Source = source::QedSource;
    type Sink = sink::QedSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Self::Source> {
        Ok(source::QedSource(image::Image::open(io, device, ErrorCode::OverlayCorrupt)?))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<Self::Sink> {
        Ok(sink::QedSink::new(image::Image::open(io, device, ErrorCode::BackingCorrupt)?, device))
    }
}
