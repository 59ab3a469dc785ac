//! The sink role: new clusters at the end of the file; the table follows when they are durable.

use crate::header::{next_content_id, CLUSTER};
use crate::image::{Entry, Image};
use alloc::vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageId, ImageInfo, PlanSummary};
use instar_guest_sdk::{checked_end, Batch, BlockIo, DriverError, DriverResult, Extent, ReadBelow, Sink};

/// Parts of clusters that are written between two flushes, at most.
const STEP: usize = 64;

/// An image that data goes into.
pub struct SlateSink {
    image: Image,
    max_length: u64,
    verified: bool,
    next_id: u64,
    identified: bool,
    new_clusters: u64,
    last: Option<usize>,
}

fn full() -> DriverError {
    DriverError::new(ErrorCode::NoSpace, "the file may not become as long as it would have to")
}

impl SlateSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        let max_length = device.max_length;
        let next_id = next_content_id(image.header.content_id, None);
        Self { image, max_length, next_id, verified: false, identified: false, new_clusters: 0, last: None }
    }

    /// Whether a part needs no room in the file: it is a whole cluster of zeroes.
    fn is_whole_zero(&self, part: &Extent) -> bool {
        let visible = CLUSTER.min(self.image.header.virtual_size - part.guest_offset);
        part.is_zero() && part.guest_offset % CLUSTER == 0 && part.length == visible
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
        let end = checked_end(offset, CLUSTER, self.max_length).ok_or_else(full)?;
        self.image.writer.write(io, offset, &bytes)?;
        self.image.file_length = end;
        self.image.table[index] = offset;
        Ok(offset)
    }

    fn step(&mut self, io: &mut dyn BlockIo, batch: &mut Batch) -> DriverResult<()> {
        if !batch.is_empty() {
            batch.submit(io)?;
            self.image.writer.written();
        }
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
        for extent in extents {
            extent.end_within(self.image.header.virtual_size)?;
            for part in extent.blocks(CLUSTER)? {
                let index = (part.guest_offset / CLUSTER) as usize;
                let is_new = !matches!(self.image.entry(index), Entry::At(_)) && !self.is_whole_zero(&part);
                if is_new && self.last.replace(index) != Some(index) {
                    self.new_clusters += 1;
                }
            }
        }
        Ok(())
    }

    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let final_length = self.image.file_length.next_multiple_of(CLUSTER) + self.new_clusters * CLUSTER;
        if self.new_clusters > 0 && final_length > self.max_length {
            return Err(full());
        }
        let final_length = if self.new_clusters > 0 { final_length } else { self.image.file_length };
        Ok(PlanSummary { final_length, new_data_clusters: self.new_clusters, ..PlanSummary::default() })
    }

    fn next_identity(&mut self, child: Option<&ImageId>) -> Option<ImageId> {
        let child = child.and_then(|child| child.as_bytes().try_into().ok()).map(u64::from_le_bytes);
        self.next_id = next_content_id(self.image.header.content_id, child);
        ImageId::new(&self.next_id.to_le_bytes())
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if !extents.is_empty() && !core::mem::replace(&mut self.identified, true) {
            self.image.header.content_id = self.next_id;
            self.image.write_header(io)?;
        }
        let mut batch = Batch::new();
        for extent in extents {
            extent.end_within(self.image.header.virtual_size)?;
            for part in extent.blocks(CLUSTER)? {
                let (index, within) = ((part.guest_offset / CLUSTER) as usize, part.guest_offset % CLUSTER);
                if self.is_whole_zero(&part) {
                    self.image.table[index] = 1;
                    continue;
                }
                let at = self.place(io, index, below)? + within;
                batch.push(part.request(self.image.device, at)?);
                if batch.len() == STEP {
                    self.step(io, &mut batch)?;
                }
            }
        }
        self.step(io, &mut batch)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.image.writer.barrier(io)
    }
}
