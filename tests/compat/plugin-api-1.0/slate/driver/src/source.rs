//! The source role.

use crate::header::CLUSTER;
use crate::image::{Entry, Image};
use core::ops::Range;
use instar_guest_sdk::abi::{CheckSummary, ErrorCode, FindingKind, ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{BlockIo, Content, DriverError, DriverResult, Extent, Extents, Source};

/// An image that data comes from.
pub struct SlateSource(pub(crate) Image);

impl Source for SlateSource {
    fn info(&self) -> ImageInfo {
        self.0.info()
    }

    fn verify(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        self.0.verify()
    }

    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let size = self.0.header.virtual_size;
        let mut at = range.start - range.start % CLUSTER;
        while at < range.end.min(size) {
            let length = CLUSTER.min(size - at);
            let extent = match self.0.entry((at / CLUSTER) as usize) {
                Entry::Absent => None,
                Entry::Zero => Some(Extent::zero(at, length)),
                Entry::Full(byte) => Some(Extent::encoded(at, length, byte.into())),
                Entry::At(offset) => Some(Extent::data(at, length, self.0.device, offset)),
            };
            if extent.is_some_and(|extent| !out.push(extent)) {
                return Ok(at);
            }
            at += length;
        }
        Ok(at)
    }

    fn read(&mut self, _: &mut dyn BlockIo, extent: &Extent, _: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let Content::Encoded { location } = extent.content else {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "only encoded clusters are decoded"));
        };
        buffer.fill(location as u8);
        Ok(())
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let held = self.0.verify()?;
        self.0.table.fill(0);
        self.0.write_table(io)?;
        let length = self.0.header.data_start();
        self.0.writer.set_length(io, length)?;
        self.0.writer.barrier(io)?;
        Ok(held)
    }

    fn identity(&self) -> Option<ImageId> {
        ImageId::new(&self.0.header.content_id.to_le_bytes())
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        let id = identity.as_bytes().try_into().map(u64::from_le_bytes).map_err(|_| {
            let text = "the parent's identity is not one of slate";
            DriverError::new(ErrorCode::InternalOverflow, text).at(self.0.device, 32)
        })?;
        self.0.header.parent_id = id;
        self.0.header.announced = stage == ParentStage::Announced;
        self.0.write_header(io)
    }

    fn check(&mut self, _: &mut dyn BlockIo, finding: &mut dyn FnMut(FindingKind, &str)) -> DriverResult<CheckSummary> {
        let faults = self.0.faults();
        faults.iter().for_each(|(_, text)| finding(FindingKind::Corruption, text));
        instar_guest_sdk::log!("{} clusters were looked at", self.0.header.clusters());
        Ok(CheckSummary {
            image_end_offset: self.0.file_length,
            total_clusters: self.0.header.clusters(),
            allocated_clusters: self.0.held(),
            corruptions: faults.len() as u64,
            ..CheckSummary::default()
        })
    }
}
