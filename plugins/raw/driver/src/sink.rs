//! The sink role: data goes to where the disk has it.
//!
//! A crash at any instant leaves a disk of which some committed parts are new and others old: the overlay, which is not
//! emptied before everything is durable, hides all of them. A file that has to become longer does so first; what is new
//! of it reads as zeroes, as it did through the overlay.

use crate::{verified, SECTOR};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageInfo, PlanSummary, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Extent, OrderedWriter, ReadBelow, Sink};

/// Requests that are submitted at once.
const BATCH: usize = 4096;

/// A raw image that data goes into.
#[derive(Debug)]
pub struct RawSink {
    out: OrderedWriter,
    virtual_size: u64,
    file_length: u64,
    max_length: u64,
    fixed_length: bool,
    /// The length in bytes that the file gets before anything is written.
    set_length: Option<u64>,
}

impl RawSink {
    /// The image on this device.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] when file and disk do not have the same length.
    pub fn open(device: &DeviceConfig) -> DriverResult<Self> {
        verified(device)?;
        Ok(Self {
            out: OrderedWriter::new(device.device),
            virtual_size: device.virtual_size,
            file_length: device.file_length,
            max_length: device.max_length,
            fixed_length: device.flags & device_flags::FIXED_LENGTH != 0,
            set_length: None,
        })
    }

    fn refused(&self, text: impl Into<alloc::string::String>) -> DriverError {
        DriverError::new(ErrorCode::UnsupportedFormat, text.into()).at(self.out.device(), self.file_length)
    }

    /// The end in bytes of an extent, which lies within the disk.
    fn end(&self, extent: &Extent) -> DriverResult<u64> {
        extent.end_within(self.virtual_size).map_err(|error| error.at(self.out.device(), self.file_length))
    }

    /// Make the file as long as it has to be.
    fn lengthen(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if let Some(length) = self.set_length.take() {
            self.out.set_length(io, length)?;
            self.file_length = length;
        }
        Ok(())
    }
}

impl Sink for RawSink {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.virtual_size, cluster_size: 1 }
    }

    fn grow(&mut self, _: &mut dyn BlockIo, virtual_size: u64, _: u64) -> DriverResult<()> {
        if virtual_size <= self.virtual_size {
            return Ok(());
        }
        if self.fixed_length && virtual_size > self.max_length {
            return Err(self.refused(format!(
                "a block device of {} bytes cannot grow by itself: enlarge the device",
                self.file_length
            )));
        }
        let length = virtual_size.checked_next_multiple_of(SECTOR).filter(|&length| length <= self.max_length);
        let length = length.ok_or_else(|| self.refused(format!("the file cannot grow to {virtual_size} bytes")))?;
        (self.virtual_size, self.set_length) = (length, Some(length));
        Ok(())
    }

    /// The end of the file is the size: it moves at one stroke, and what is past it is gone for good.
    fn shrink(&mut self, _: &mut dyn BlockIo, virtual_size: u64) -> DriverResult<()> {
        if self.fixed_length {
            return Err(self.refused(format!(
                "a block device of {} bytes cannot shrink by itself: make the device smaller",
                self.file_length
            )));
        }
        if virtual_size >= self.virtual_size || !virtual_size.is_multiple_of(SECTOR) {
            return Err(self.refused(format!("the file cannot shrink to {virtual_size} bytes")));
        }
        (self.virtual_size, self.set_length) = (virtual_size, Some(virtual_size));
        Ok(())
    }

    fn plan(&mut self, _: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        for extent in extents {
            // The rest of a last sector that the file does not have: it is about to.
            if self.end(extent)? > self.file_length && !extent.is_zero() {
                self.set_length = Some(self.virtual_size);
            }
        }
        match self.set_length {
            Some(length) if length > self.max_length => {
                Err(self.refused(format!("the file cannot grow to {length} bytes")))
            }
            _ => Ok(()),
        }
    }

    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let final_length = self.set_length.unwrap_or(self.file_length);
        Ok(PlanSummary { final_length, ..PlanSummary::default() })
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], _: &mut dyn ReadBelow) -> DriverResult<()> {
        self.lengthen(io)?;
        for batch in extents.chunks(BATCH) {
            let request = |extent: &Extent| {
                self.end(extent)?;
                extent.request(self.out.device(), extent.guest_offset)
            };
            let mut requests = batch.iter().map(request).collect::<DriverResult<Vec<Request>>>()?;
            self.out.run(io, &mut requests)?;
        }
        Ok(())
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.out.barrier(io)
    }
}
