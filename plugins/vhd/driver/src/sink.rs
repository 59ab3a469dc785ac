//! The sink role: a fixed disk, or one with blocks.

use crate::fixed::FixedSink;
use crate::open::Opened;
use crate::sparse_sink::SparseSink;
use alloc::boxed::Box;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ImageInfo, PlanSummary};
use instar_guest_sdk::{BlockIo, DriverResult, Extent, ReadBelow, Sink};

/// A VHD that data goes into. Its unique ID stays what it is: children know it by that, whatever it holds.
#[derive(Debug)]
pub struct VhdSink {
    body: Body,
    max_length: u64,
    fixed_length: bool,
}

#[derive(Debug)]
enum Body {
    Fixed(Box<FixedSink>),
    Sparse(Box<SparseSink>),
}

impl VhdSink {
    pub(crate) fn new(opened: Opened, device: &DeviceConfig) -> Self {
        let body = match opened {
            Opened::Fixed(fixed) => Body::Fixed(Box::new(FixedSink::new(*fixed, device))),
            Opened::Sparse(image) => Body::Sparse(Box::new(SparseSink::new(*image, device))),
        };
        let fixed_length = device.flags & device_flags::FIXED_LENGTH != 0;
        Self { body, max_length: device.max_length, fixed_length }
    }
}

impl Sink for VhdSink {
    fn info(&self) -> ImageInfo {
        match &self.body {
            Body::Fixed(fixed) => ImageInfo { virtual_size: fixed.size(), cluster_size: 1 },
            Body::Sparse(sparse) => {
                ImageInfo { virtual_size: sparse.size(), cluster_size: sparse.image.header.block_size() }
            }
        }
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, _: u64) -> DriverResult<()> {
        if virtual_size <= self.info().virtual_size {
            return Ok(());
        }
        match &mut self.body {
            Body::Fixed(fixed) => fixed.grow(virtual_size, self.fixed_length),
            Body::Sparse(sparse) => sparse.grow(io, virtual_size),
        }
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        match &mut self.body {
            Body::Fixed(fixed) => extents.iter().try_for_each(|extent| extent.end_within(fixed.size()).map(|_| ())),
            Body::Sparse(sparse) => sparse.plan(io, extents),
        }
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        match &mut self.body {
            Body::Fixed(fixed) => fixed.planned(self.max_length),
            Body::Sparse(sparse) => sparse.planned(io),
        }
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        match &mut self.body {
            Body::Fixed(fixed) => fixed.write(io, extents),
            Body::Sparse(sparse) => sparse.write(io, extents, below),
        }
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        match &mut self.body {
            Body::Fixed(fixed) => fixed.finish(io),
            Body::Sparse(sparse) => sparse.finish(io),
        }
    }
}
