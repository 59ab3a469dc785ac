//! What the image records of its parent while that is written: see `instar_vhdx_format::Lineage` for the two places.
//!
//! In the locator, which is changed in its place, each value lies within one sector, so no write of it is torn, and at every
//! instant one of the two is what the parent has:
//!
//! 1. if an earlier announcement has become true, `parent_linkage` takes it over, and that is made durable;
//! 2. `parent_linkage2` is what the parent is about to have, durably, before the parent has it;
//! 3. once the parent is complete, `parent_linkage` is that, too.
//!
//! In the header, its FileWriteGuid is what the parent is about to have; a header that is torn leaves the other one. Emptying
//! the image brings the locator up to date with an entry of the log.

use crate::image::Image;
use instar_guest_sdk::abi::{ImageId, ParentStage};
use instar_guest_sdk::{overflow, BlockIo, DriverResult, OrderedWriter};
use instar_vhdx_format::{Guid, Record};

impl Image {
    /// See [`Source::follow_parent`](instar_guest_sdk::Source::follow_parent).
    pub fn follow(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        let new = identity.as_bytes().try_into().map(Guid).map_err(|_| overflow("the identity of a parent"))?;
        let Some(lineage) = self.opened.lineage() else { return Ok(()) };
        let mut out = OrderedWriter::new(self.device);
        match (lineage.record, stage) {
            (Record::Locator { linkage, linkage2 }, ParentStage::Announced) => {
                if let Some(reached) = lineage.announced.filter(|announced| *announced != new) {
                    out.write(io, linkage, &reached.encode())?;
                    out.barrier(io)?;
                    self.link(Some(reached), None);
                }
                if lineage.announced != Some(new) {
                    out.write(io, linkage2, &new.encode())?;
                    self.link(None, Some(new));
                }
            }
            (Record::Locator { linkage, .. }, ParentStage::Reached) => {
                out.write(io, linkage, &new.encode())?;
                self.link(Some(new), None);
            }
            (Record::Header, ParentStage::Announced) if lineage.announced != Some(new) => {
                self.update_one_header(io, &mut out, |header| header.file_write = new)?;
            }
            (Record::Header, _) => {}
        }
        out.barrier(io)
    }

    /// What the locator says now.
    fn link(&mut self, linkage: Option<Guid>, linkage2: Option<Guid>) {
        if let Some(locator) = &mut self.opened.locator {
            locator.linkage = linkage.unwrap_or(locator.linkage);
            locator.linkage2 = linkage2.or(locator.linkage2);
        }
    }
}
