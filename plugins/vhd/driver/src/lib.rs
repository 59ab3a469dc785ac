//! The guest half of the vhd plugin: fixed, dynamic and differencing disks, as source and as sink.
#![no_std]

extern crate alloc;

mod batmap;
mod check;
mod empty;
mod failures;
mod fixed;
mod group;
mod grow;
mod growth;
mod image;
mod lookup;
mod mend;
mod open;
mod parent;
mod sink;
mod source;
mod sparse_sink;
mod table;
mod verify;

pub use sink::VhdSink;
pub use source::VhdSource;

use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The VHD format.
pub struct Vhd;

impl FormatDriver for Vhd {
    type Source = VhdSource;
    type Sink = VhdSink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<VhdSource> {
        Ok(VhdSource::new(open::open(io, device, ErrorCode::OverlayCorrupt)?))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<VhdSink> {
        Ok(VhdSink::new(open::open(io, device, ErrorCode::BackingCorrupt)?, device))
    }
}
