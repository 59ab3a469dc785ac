//! A format without metadata: the device is the disk.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{DeviceConfig, Extent, ExtentKind, ImageInfo, PlanSummary, Request};
use instar_guest_sdk::{export_format, BlockIo, DriverError, DriverResult, FormatDriver, ReadBelow, Sink, Source};

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
    fn check(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        Ok(self.length)
    }
    fn extents(
        &mut self,
        _: &mut dyn BlockIo,
        range: Range<u64>,
        _: usize,
        out: &mut Vec<Extent>,
    ) -> DriverResult<u64> {
        let from = range.start;
        let length = self.length - from;
        out.push(Extent {
            guest_offset: from,
            length,
            location: from,
            kind: ExtentKind::Data as u32,
            device: self.device,
        });
        Ok(self.length)
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
        let mut requests: Vec<Request> = extents
            .iter()
            .map(|e| Request::copy(e.device, e.location, self.device, e.guest_offset, e.length))
            .collect();
        io.run(&mut requests)
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
