//! The source role: runs of sectors that the image holds.

use crate::extents::extents;
use crate::image::Image;
use crate::lookup::Lookup;
use crate::parent::NewParent;
use core::ops::Range;
use instar_guest_sdk::abi::{
    CheckSummary, DeviceConfig, ErrorCode, FindingKind, ImageId, ImageInfo, ParentStage, Repair, RepairSummary,
};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, Extents, Parent, Source};

/// A VHDX that data comes from.
#[derive(Debug)]
pub struct VhdxSource {
    image: Image,
    lookup: Lookup,
    /// What was planned last.
    parent: Option<NewParent>,
    /// What the host lets the file become, in bytes.
    max_length: u64,
}

impl VhdxSource {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        Self { image, lookup: Lookup::default(), parent: None, max_length: device.max_length }
    }
}

impl Source for VhdxSource {
    fn info(&self) -> ImageInfo {
        self.image.info()
    }

    /// A block is held, even if its bitmap says that no sector of it is there.
    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty && !self.image.layout.has_parent {
            let text = "it cannot be emptied: it has no parent";
            let place = self.image.opened.metadata_region.offset;
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.image.device, place));
        }
        Ok(self.image.verify(io)?.held)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        extents(io, &self.image, &mut self.lookup, &range, out)
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Err(overflow("an encoded extent"))
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.lookup.forget();
        self.image.empty(io)
    }

    fn identity(&self) -> Option<ImageId> {
        ImageId::new(&self.image.opened.headers.current.data_write.0)
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.image.follow(io, identity, stage)
    }

    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        self.image.check(io, finding)
    }

    fn plan_parent(&mut self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        self.parent = Some(self.image.plan_parent(io, parent)?);
        Ok(())
    }

    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let parent = self.parent.take().ok_or_else(|| overflow("a parent that was not planned"))?;
        self.image.set_parent(io, &parent)
    }

    fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        self.image.plan_repair(io, repair, self.max_length, finding)
    }

    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.image.repair(io)
    }
}
