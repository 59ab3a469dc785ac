//! The guest half of the qcow plugin: images of version 1, as source and as sink.
#![no_std]

extern crate alloc;

mod decode;
mod grow;
mod image;
mod parent;
mod sink;
mod source;
mod survey;
mod walk;
mod write;

pub use sink::QcowSink;
pub use source::QcowSource;

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The qcow format, version 1.
pub struct Qcow;

impl FormatDriver for Qcow {
    type Source = QcowSource;
    type Sink = QcowSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<QcowSource> {
        Ok(QcowSource::new(image::Image::open(io, device, ErrorCode::OverlayCorrupt)?, device))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<QcowSink> {
        Ok(QcowSink::new(image::Image::open(io, device, ErrorCode::BackingCorrupt)?, device, has_backing))
    }
}
