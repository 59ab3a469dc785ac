//! A fixed disk: all of its bytes, then a footer, of which there is no copy.

use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, PlanSummary, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Extent, OrderedWriter};
use instar_vhd_format::{Footer, FOOTER_BYTES, MAX_SECTORS, SECTOR};

/// Requests that are submitted at once.
const BATCH: usize = 4096;

/// An open fixed disk.
#[derive(Clone, Copy, Debug)]
pub struct Fixed {
    pub device: u32,
    pub footer: Footer,
    /// Bytes of the disk, whole sectors.
    pub size: u64,
    /// Where the footer begins: not before the disk ends.
    pub tail_offset: u64,
}

/// A fixed disk that data goes into: in place, for the overlay hides what is written.
#[derive(Debug)]
pub struct FixedSink {
    image: Fixed,
    file_length: u64,
    /// The size that the disk gets with the first write.
    growth: Option<u64>,
    out: OrderedWriter,
}

impl FixedSink {
    pub(crate) fn new(image: Fixed, device: &DeviceConfig) -> Self {
        let (file_length, out) = (device.file_length, OrderedWriter::new(image.device));
        Self { image, file_length, growth: None, out }
    }

    /// Bytes of the disk, once it has grown.
    pub fn size(&self) -> u64 {
        self.growth.unwrap_or(self.image.size)
    }

    fn refused(&self, text: &str) -> DriverError {
        DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.image.device, self.image.tail_offset)
    }

    /// See [`Sink::grow`](instar_guest_sdk::Sink::grow).
    pub fn grow(&mut self, size: u64, fixed_length: bool) -> DriverResult<()> {
        if fixed_length {
            return Err(self.refused("a fixed VHD on a block device cannot grow: copy it into a file"));
        }
        if self.image.footer.has_saved_state() {
            return Err(self.refused(SAVED_STATE));
        }
        self.growth = Some(grown_size(size).ok_or_else(|| self.refused(TOO_LARGE))?);
        Ok(())
    }

    /// Where the footer goes: behind the grown disk, and never further in front than it is.
    fn new_tail(&self) -> u64 {
        self.image.tail_offset.max(self.size())
    }

    /// See [`Sink::planned`](instar_guest_sdk::Sink::planned).
    pub fn planned(&self, max_length: u64) -> DriverResult<PlanSummary> {
        let grown = self.new_tail().saturating_add(FOOTER_BYTES as u64);
        let final_length = if self.growth.is_some() { grown.max(self.file_length) } else { self.file_length };
        if final_length > max_length.max(self.file_length) {
            let text =
                format!("the file would become {final_length} bytes long, and cannot be longer than {max_length}");
            return Err(self.refused(&text));
        }
        Ok(PlanSummary { final_length, ..PlanSummary::default() })
    }

    /// The disk grows in an order that every crash survives. At each instant the file ends with a footer:
    ///
    /// 1. the footer as it is goes to its new place: the disk is as large as before, and its file longer;
    /// 2. what lies between becomes zero, the old footer above all: it is in no disk yet;
    /// 3. the footer at the new place, one sector, gets the new size. Data that a crash leaves behind a disk of the old size becomes
    ///    zero when it grows again.
    fn make_grow(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let Some(size) = self.growth.take() else { return Ok(()) };
        let (from, to) = (self.image.tail_offset, size.max(self.image.tail_offset));
        if to > from {
            self.out.write(io, to, &self.image.footer.encode())?;
            self.out.barrier(io)?;
        }
        if to > self.image.size {
            self.out.zero(io, self.image.size, to - self.image.size)?;
            self.out.barrier(io)?;
        }
        let footer = self.image.footer.with_size(size);
        self.out.write(io, to, &footer.encode())?;
        self.image = Fixed { footer, size, tail_offset: to, ..self.image };
        self.file_length = to + FOOTER_BYTES as u64;
        Ok(())
    }

    /// See [`Sink::write`](instar_guest_sdk::Sink::write).
    pub fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.make_grow(io)?;
        for some in extents.chunks(BATCH) {
            let request = |extent: &Extent| {
                extent.end_within(self.image.size)?;
                extent.request(self.image.device, extent.guest_offset)
            };
            let mut requests = some.iter().map(request).collect::<DriverResult<Vec<Request>>>()?;
            self.out.run(io, &mut requests)?;
        }
        Ok(())
    }

    /// See [`Sink::finish`](instar_guest_sdk::Sink::finish).
    pub fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.out.barrier(io)
    }
}

/// Why a disk that is in use by a suspended machine does not grow ("Hard Disk Footer Format", Saved State).
pub const SAVED_STATE: &str = "a disk in a saved state cannot grow: discard the state of its machine first";
/// Why a disk does not grow beyond the format's bound.
pub const TOO_LARGE: &str = "a VHD holds no more than 2040 GiB";

/// A size in bytes as a VHD can have it: whole sectors; `None` for one that is too large.
pub fn grown_size(size: u64) -> Option<u64> {
    size.checked_next_multiple_of(SECTOR).filter(|&size| size / SECTOR <= MAX_SECTORS)
}
