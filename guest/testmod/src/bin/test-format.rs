//! A format without metadata: the device is the disk.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{DeviceConfig, ImageInfo, PlanSummary, Request};
use instar_guest_sdk::{
    export_format, BlockIo, DriverError, DriverResult, Extent, Extents, FormatDriver, ReadBelow, Sink, Source,
};

struct Plain;

struct Image {
    device: u32,
    length: u64,
}

impl Image {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.length, cluster_size: 1 }
    }
}

impl Source for Image {
    fn info(&self) -> ImageInfo {
        self.info()
    }
    fn verify(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        Ok(self.length)
    }
    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let from = range.start;
        let taken = out.push(Extent::data(from, self.length - from, self.device, from));
        Ok(if taken { self.length } else { from })
    }
    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Ok(())
    }
    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Err(DriverError::new(instar_guest_sdk::abi::ErrorCode::UnsupportedFormat, "cannot be emptied"))
    }
}

impl Sink for Image {
    fn info(&self) -> ImageInfo {
        self.info()
    }
    fn plan(&mut self, _: &mut dyn BlockIo, _: &[Extent]) -> DriverResult<()> {
        Ok(())
    }
    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        Ok(PlanSummary { final_length: self.length, ..PlanSummary::default() })
    }
    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], _: &mut dyn ReadBelow) -> DriverResult<()> {
        let requests = extents.iter().map(|extent| extent.request(self.device, extent.guest_offset));
        io.run(&mut requests.collect::<DriverResult<Vec<Request>>>()?)
    }
    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        io.flush(self.device)
    }
}

impl FormatDriver for Plain {
    type Source = Image;
    type Sink = Image;
    fn open_source(_: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Image> {
        Ok(Image { device: device.device, length: device.file_length })
    }
    fn open_sink(_: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<Image> {
        Ok(Image { device: device.device, length: device.file_length })
    }
}

export_format!(Plain);
