//! A format of the harness's own, of the simplest kind: a driver is tested against it in one role at a time, with extents of
//! single sectors, which no format with clusters gives.
//!
//! A file is a map with a byte for each sector, padded to a whole sector, and then the sectors, each in its place.

use super::kit::{sink_of, source_of, Builder, ImageKit};
use super::layer::{Held, Layer, SECTOR};
use crate::{
    overflow, Batch, BlockIo, Content, DriverError, DriverResult, Extent, Extents, FormatDriver, OrderedWriter,
    ReadBelow, Sink, Source,
};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{DeviceConfig, ErrorCode, ImageInfo, PlanSummary, Request};

/// A byte of the map: nothing is held.
const NOTHING: u8 = 0;
/// The sector stands in its place.
const DATA: u8 = 1;
/// It is zero.
const ZERO: u8 = 2;
/// It stands in its place, with all bits turned over.
const ENCODED: u8 = 3;

/// Bytes of the map of a disk of this size.
fn map_bytes(size: u64) -> u64 {
    (size / SECTOR).next_multiple_of(SECTOR)
}

/// The format.
pub(super) struct Sectors;

impl FormatDriver for Sectors {
    type Source = Image;
    type Sink = Image;

    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Image> {
        Image::open(io, device)
    }

    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<Image> {
        Image::open(io, device)
    }
}

/// An open image.
pub(super) struct Image {
    out: OrderedWriter,
    size: u64,
    length: u64,
    map: Vec<u8>,
}

impl Image {
    fn open(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Self> {
        let (number, size) = (device.device, device.virtual_size);
        let mut map = vec![0; usize::try_from(size / SECTOR).map_err(|_| overflow("the size of the disk"))?];
        io.read(number, 0, &mut map)?;
        if let Some(sector) = map.iter().position(|&state| state > ENCODED) {
            let text = "the map has a state that does not exist";
            return Err(DriverError::new(ErrorCode::OverlayCorrupt, text).at(number, sector as u64));
        }
        Ok(Self { out: OrderedWriter::new(number), size, length: device.file_length, map })
    }

    /// Where a guest byte stands.
    fn place(&self, guest: u64) -> u64 {
        map_bytes(self.size).saturating_add(guest)
    }

    /// The sectors of an extent, by their numbers.
    fn sectors(&mut self, extent: &Extent) -> DriverResult<&mut [u8]> {
        let range = (extent.guest_offset / SECTOR, extent.end() / SECTOR);
        let range = usize::try_from(range.0).ok().zip(usize::try_from(range.1).ok());
        range.and_then(|(start, end)| self.map.get_mut(start..end)).ok_or_else(|| overflow("an extent"))
    }
}

impl Source for Image {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.size, cluster_size: SECTOR }
    }

    fn verify(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        Ok(self.map.iter().filter(|&&state| state != NOTHING).count() as u64)
    }

    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let mut at = range.start - range.start % SECTOR;
        while at < range.end.min(self.size) {
            let state = usize::try_from(at / SECTOR).ok().and_then(|sector| self.map.get(sector));
            let place = self.place(at);
            let content = match state.copied().unwrap_or(NOTHING) {
                DATA => Some(Content::Data { device: self.out.device(), offset: place }),
                ZERO => Some(Content::Zero),
                ENCODED => Some(Content::Encoded { location: place }),
                _ => None,
            };
            if content.is_some_and(|content| !out.push(Extent { guest_offset: at, length: SECTOR, content })) {
                return Ok(at);
            }
            at += SECTOR;
        }
        Ok(at)
    }

    fn read(&mut self, io: &mut dyn BlockIo, _: &Extent, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        io.read(self.out.device(), self.place(guest_offset), buffer)?;
        buffer.iter_mut().for_each(|byte| *byte = !*byte);
        Ok(())
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let held = self.verify(io, true)?;
        if held > 0 {
            self.map.fill(NOTHING);
            self.out.zero(io, 0, map_bytes(self.size))?;
        }
        self.out.barrier(io)?;
        Ok(held)
    }
}

impl Sink for Image {
    fn info(&self) -> ImageInfo {
        Source::info(self)
    }

    fn plan(&mut self, _: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        extents.iter().try_for_each(|extent| extent.end_within(self.size).map(|_| ()))
    }

    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        Ok(PlanSummary { final_length: self.length, ..PlanSummary::default() })
    }

    /// Data, a flush, and then the map.
    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], _: &mut dyn ReadBelow) -> DriverResult<()> {
        let mut data = Batch::new();
        for extent in extents {
            let state = if extent.is_zero() { ZERO } else { DATA };
            self.sectors(extent)?.fill(state);
            if state == DATA {
                data.push(extent.request(self.out.device(), self.place(extent.guest_offset))?);
            }
        }
        data.submit_to(io, &mut self.out)?;
        self.out.barrier(io)?;
        let map = (self.map.as_ptr() as u64, self.map.len() as u64);
        self.out.run(io, &mut [Request::write(self.out.device(), 0, map.0, map.1)])
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.out.barrier(io)
    }
}

impl ImageKit for Sectors {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Self>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Self>(io, device, has_backing)
    }

    fn info(&self, image: &[u8]) -> ImageInfo {
        // The longer the disk, the longer the file: at most one length fits.
        let sectors = image.len() as u64 / SECTOR;
        let size = (0..=sectors).rev().find(|size| map_bytes(size * SECTOR) + size * SECTOR == image.len() as u64);
        ImageInfo { virtual_size: size.unwrap_or(0) * SECTOR, cluster_size: SECTOR }
    }

    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        let size = self.info(image).virtual_size;
        let mut disk = below.unwrap_or_default().to_vec();
        disk.resize(usize::try_from(size).unwrap_or(0), 0);
        let sectors = image.get(usize::try_from(map_bytes(size)).unwrap_or(usize::MAX)..).unwrap_or_default();
        let bytes = usize::try_from(SECTOR).unwrap_or(usize::MAX);
        for ((place, held), state) in disk.chunks_mut(bytes).zip(sectors.chunks(bytes)).zip(image) {
            match *state {
                DATA => place.copy_from_slice(held),
                ZERO => place.fill(0),
                ENCODED => place.iter_mut().zip(held).for_each(|(to, from)| *to = !*from),
                _ => {}
            }
        }
        disk
    }
}

impl Builder for Sectors {
    fn cluster(&self) -> u64 {
        SECTOR
    }

    fn states(&self) -> &[Held] {
        &[Held::Nothing, Held::Data, Held::Zero, Held::Encoded]
    }

    fn build(&self, layer: &Layer) -> Vec<u8> {
        let mut image: Vec<u8> = layer.held.iter().map(|held| *held as u8).collect();
        image.resize(usize::try_from(map_bytes(layer.size)).unwrap_or(0), 0);
        for (sector, held) in (0..).zip(&layer.held) {
            let mut bytes = layer.bytes(sector);
            if *held == Held::Encoded {
                bytes.iter_mut().for_each(|byte| *byte = !*byte);
            }
            image.extend(bytes);
        }
        image
    }
}

const _: () = assert!(Held::Nothing as u8 == NOTHING && Held::Data as u8 == DATA);
const _: () = assert!(Held::Zero as u8 == ZERO && Held::Encoded as u8 == ENCODED);
