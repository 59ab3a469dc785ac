//! The guest half of the qcow2 plugin: the source and sink roles over block requests.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`). Module by module:
//!
//! * [`image`]: an open image: header, features, bounds;
//! * [`slice_cache`]: pieces of metadata, read and written in batches;
//! * [`cluster_set`]: which host clusters are referenced, in bounded memory;
//! * [`refcounts`]: looking refcounts up through the refcount table;
//! * [`scan`]: walking a whole table once;
//! * [`snapshots`]: the tables that internal snapshots hold;
//! * [`decode`]: reading compressed clusters;
//! * [`reference_counts`], `references`, [`repair`]: images that were not closed cleanly;
//! * `tables`: all L2 tables, each once, whoever refers to it;
//! * [`source`], [`check`], `examine`, [`empty`], [`empty_shared`], `block_table`: the source role;
//! * [`metadata_map`], [`allocator`], [`forecast`], [`free_clusters`], [`sink`], [`plan`], `survey`, [`grow`], [`write`], `publish`,
//!   `subclusters`: the sink role;
//! * [`bitmaps`], [`record`]: the persistent bitmaps of a sink.
#![no_std]

extern crate alloc;

mod action;
pub mod allocator;
pub mod bitmaps;
mod block_table;
pub mod check;
pub mod cluster_set;
mod contents;
mod data;
pub mod decode;
pub mod empty;
pub mod empty_shared;
mod examine;
pub mod forecast;
pub mod free_clusters;
pub mod grow;
mod grow_bitmaps;
mod growth;
pub mod image;
mod l2_entry;
mod l2_window;
mod mapped_clusters;
pub mod metadata_map;
mod new_space;
mod pieces;
pub mod plan;
mod planned;
mod publish;
pub mod record;
pub mod refcounts;
pub mod reference_counts;
mod references;
mod remap;
pub mod repair;
pub mod scan;
pub mod sink;
pub mod slice_cache;
pub mod snapshots;
pub mod source;
mod subcluster_change;
mod subclusters;
mod survey;
mod table_reader;
mod tables;
mod windows;
pub mod write;

use image::{Image, Role};
use instar_guest_sdk::abi::DeviceConfig;
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver};

/// The qcow2 format.
pub struct Qcow2;

impl FormatDriver for Qcow2 {
    type Source = source::Qcow2Source;
    type Sink = sink::Qcow2Sink;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Self::Source> {
        let image = Image::open(io, device, Role::Source)?;
        let view = match device.snapshot {
            0 => image,
            number => snapshots::snapshot_view(io, &image, number, device.virtual_size)?,
        };
        Ok(source::Qcow2Source::new(view))
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Self::Sink> {
        Ok(sink::Qcow2Sink::new(Image::open(io, device, Role::Sink)?, has_backing))
    }
}
