//! The guest half of the qcow2 plugin: the source and sink roles over block requests.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`). The words are those of the specification and of QEMU (`docs/interop/qcow2.rst`, `block/qcow2-refcount.c`).
//! From the ground up, each on those before it:
//!
//! * [`image`]: an open image: header, features, bounds;
//! * `data_file`: the file that holds the guest's clusters, of an image that has one;
//! * `metadata`: tables and their entries, and all structures of the file;
//! * [`refcount`]: refcounts, and the allocation of clusters;
//! * `references`: references to clusters, counted: what refcounts should say;
//! * `read`: what a layer holds;
//! * `check`: verifying before a commit, examining for a report, repairing;
//! * `empty`: emptying an overlay that was committed;
//! * `parent`: another backing file in the header;
//! * `source`: the source role;
//! * `write`, `grow`: planning and writing a commit, and growing for it;
//! * `shrink`: cutting the disk;
//! * `sink`: the sink role.
#![no_std]

extern crate alloc;

mod bitmaps;
mod check;
mod data_file;
mod empty;
mod grow;
pub mod image;
mod metadata;
mod parent;
mod read;
pub mod refcount;
mod references;
mod shrink;
mod sink;
mod source;
#[cfg(test)]
mod testing;
mod write;

use image::{Image, Role};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, FormatDriver};
use metadata::snapshot_table::snapshot_view;

pub use sink::Qcow2Sink;
pub use source::Qcow2Source;

/// The qcow2 format.
pub struct Qcow2;

impl FormatDriver for Qcow2 {
    type Source = Qcow2Source;
    type Sink = Qcow2Sink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Self::Source> {
        let image = Image::open(io, device, Role::Source)?;
        let view = match device.snapshot {
            0 => image,
            number => snapshot_view(io, &image, number, device.virtual_size)?,
        };
        Ok(Qcow2Source::new(view))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Self::Sink> {
        let compresses = device.flags & device_flags::COMPRESS != 0;
        let image = Image::open(io, device, Role::Sink)?;
        if compresses && image.data.is_some() {
            let text = "the clusters of an external data file cannot be compressed: leave out -c";
            return Err(DriverError::new(ErrorCode::ExternalDataFile, text).at(device.device, 72));
        }
        Ok(Qcow2Sink::new(image, has_backing, compresses))
    }
}
