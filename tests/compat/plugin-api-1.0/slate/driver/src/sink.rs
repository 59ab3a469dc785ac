//! The sink role: new clusters at the end of the file; the table follows when they are durable.

use crate::header::CLUSTER;
use crate::image::{Entry, Image};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, Extent, ExtentKind, ImageInfo, PlanSummary, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, ReadBelow, Sink};

/// Parts of clusters that are written between two flushes, at most.
const STEP: usize = 64;

/// An image that data goes into.
pub struct SlateSink {
    image: Image,
    max_length: u64,
    verified: bool,
    identified: bool,
    new_clusters: u64,
    last: Option<usize>,
}

/// The parts of an extent, one for each cluster that it touches.
fn parts(extent: &Extent) -> impl Iterator<Item = Extent> + '_ {
    let end = extent.guest_offset + extent.length;
    (extent.guest_offset / CLUSTER..end.div_ceil(CLUSTER)).map(move |index| {
        let at = extent.guest_offset.max(index * CLUSTER);
        let length = end.min((index + 1) * CLUSTER) - at;
        Extent { guest_offset: at, length, location: extent.location.wrapping_add(at - extent.guest_offset), ..*extent }
    })
}

impl SlateSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        let max_length = device.max_length;
        Self { image, max_length, verified: false, identified: false, new_clusters: 0, last: None }
    }

    /// Whether a part needs no room in the file: it is a whole cluster of zeroes.
    fn is_zero(&self, part: &Extent) -> bool {
        let visible = CLUSTER.min(self.image.header.virtual_size - part.guest_offset);
        let whole = part.guest_offset % CLUSTER == 0 && part.length == visible;
        whole && part.kind == ExtentKind::Zero as u32
    }

    /// Where the cluster is, made for it if it is nowhere, with what it read as before.
    fn place(&mut self, io: &mut dyn BlockIo, index: usize, below: &mut dyn ReadBelow) -> DriverResult<u64> {
        let mut bytes = vec![0; CLUSTER as usize];
        match self.image.entry(index) {
            Entry::At(offset) => return Ok(offset),
            Entry::Full(byte) => bytes.fill(byte),
            Entry::Absent if below.exists() => {
                let start = index as u64 * CLUSTER;
                let visible = CLUSTER.min(self.image.header.virtual_size - start);
                below.read(io, start, &mut bytes[..visible as usize])?;
            }
            Entry::Absent | Entry::Zero => {}
        }
        let offset = self.image.file_length.next_multiple_of(CLUSTER);
        let end = offset + CLUSTER;
        if end > self.max_length {
            return Err(DriverError::new(ErrorCode::NoSpace, "the file may not become as long as it would have to"));
        }
        io.write(self.image.device, offset, &bytes)?;
        self.image.file_length = end;
        self.image.table[index] = offset;
        Ok(offset)
    }

    fn step(&mut self, io: &mut dyn BlockIo, requests: &mut Vec<Request>) -> DriverResult<()> {
        requests.push(Request::flush(self.image.device));
        io.run(requests)?;
        requests.clear();
        self.image.write_table(io)
    }
}

impl Sink for SlateSink {
    fn info(&self) -> ImageInfo {
        self.image.info()
    }

    fn plan(&mut self, _: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        if !core::mem::replace(&mut self.verified, true) {
            self.image.verify()?;
        }
        for part in extents.iter().flat_map(parts) {
            let index = (part.guest_offset / CLUSTER) as usize;
            let is_new = !matches!(self.image.entry(index), Entry::At(_)) && !self.is_zero(&part);
            if is_new && self.last.replace(index) != Some(index) {
                self.new_clusters += 1;
            }
        }
        Ok(())
    }

    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let final_length = self.image.file_length.next_multiple_of(CLUSTER) + self.new_clusters * CLUSTER;
        if self.new_clusters > 0 && final_length > self.max_length {
            return Err(DriverError::new(ErrorCode::NoSpace, "the file may not become as long as it would have to"));
        }
        Ok(PlanSummary { final_length, new_data_clusters: self.new_clusters, new_metadata_clusters: 0 })
    }

    fn next_content_id(&self) -> Option<u64> {
        Some(self.image.header.content_id.wrapping_add(1))
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if !extents.is_empty() && !core::mem::replace(&mut self.identified, true) {
            self.image.header.content_id = self.image.header.content_id.wrapping_add(1);
            self.image.write_header(io)?;
        }
        let mut requests = Vec::new();
        for part in extents.iter().flat_map(parts) {
            let (index, within) = ((part.guest_offset / CLUSTER) as usize, part.guest_offset % CLUSTER);
            if self.is_zero(&part) {
                self.image.table[index] = 1;
                continue;
            }
            let (device, at) = (self.image.device, self.place(io, index, below)? + within);
            requests.push(match ExtentKind::from_u32(part.kind) {
                Some(ExtentKind::Data) => Request::copy(part.device, part.location, device, at, part.length),
                Some(ExtentKind::Memory) => Request::write(device, at, part.location, part.length),
                Some(ExtentKind::Zero) => Request::zero(device, at, part.length),
                _ => return Err(DriverError::new(ErrorCode::InternalOverflow, "an extent that is not for sinks")),
            });
            if requests.len() == STEP {
                self.step(io, &mut requests)?;
            }
        }
        self.step(io, &mut requests)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        io.flush(self.image.device)
    }
}
