//! The source role of a disk: the extents one after the other.

use crate::content_id::DescriptorPlace;
use crate::disk::{Body, Disk, Part};
use crate::mend::{Mend, REST};
use crate::sparse_source::SparseSource;
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{
    CheckSummary, ErrorCode, FindingKind, ImageId, ImageInfo, ParentStage, Repair, RepairSummary,
};
use instar_guest_sdk::table::tell_findings;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, Extents, Parent, Source};
use instar_vmdk_format::{Step, NO_PARENT};

/// A vmdk that data comes from.
#[derive(Debug)]
pub struct VmdkSource {
    info: ImageInfo,
    pub(crate) descriptor: DescriptorPlace,
    pub(crate) parts: Vec<Part<SparseSource>>,
    /// What was planned last.
    steps: Option<Vec<Step>>,
    /// What a repair is to mend, by extent.
    mends: Vec<Mend>,
}

impl VmdkSource {
    pub(crate) fn new(disk: Disk) -> DriverResult<Self> {
        let info = ImageInfo { virtual_size: disk.size, cluster_size: disk.cluster_size };
        let (descriptor, parts) = disk.map(|image, _| Ok(SparseSource::new(image)))?;
        Ok(Self { info, descriptor, parts, steps: None, mends: Vec::new() })
    }
}

impl Source for VmdkSource {
    fn info(&self) -> ImageInfo {
        self.info
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if let Some(id) = &self.descriptor.text.parent_id {
            // Which one it will be is not known here: any of as many digits as it is now.
            self.descriptor.can_replace(id, id.value)?;
        }
        let mut held: u64 = 0;
        for part in &mut self.parts {
            let count = match &mut part.body {
                Body::Sparse(sparse) => sparse.verify(io, will_empty)?,
                Body::SeSparse(sparse) if will_empty => {
                    let text =
                        "a seSparse extent cannot be emptied: VMware documents neither its journal nor its back map";
                    return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(sparse.device, 0));
                }
                Body::SeSparse(sparse) => sparse.verify(io)?,
                Body::Flat(flat) if will_empty => {
                    let text = "a flat extent cannot be emptied";
                    return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(flat.device, flat.offset));
                }
                Body::Flat(_) => part.length.div_ceil(self.info.cluster_size.max(1)),
            };
            held = held.checked_add(count).ok_or_else(|| overflow("the number of grains"))?;
        }
        Ok(held)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let mut at = range.start;
        let wanted = |part: &&mut Part<SparseSource>| part.end() > range.start && part.start < range.end;
        for part in self.parts.iter_mut().filter(wanted) {
            let mut found = Extents::with_room_for(out.room());
            if found.is_full() {
                return Ok(at);
            }
            let local = at - part.start;
            let next = match &mut part.body {
                Body::Sparse(sparse) => sparse.extents(io, local..range.end - part.start, &mut found)?,
                Body::SeSparse(sparse) => sparse.extents(io, local..range.end - part.start, &mut found)?,
                Body::Flat(flat) => {
                    let rest = Extent::data(local, part.length - local, flat.device, flat.offset + local);
                    if found.push(rest) {
                        part.length
                    } else {
                        local
                    }
                }
            };
            for extent in found.iter() {
                let shifted = Extent { guest_offset: extent.guest_offset + part.start, ..*extent };
                if !out.push(shifted) {
                    return Ok(shifted.guest_offset);
                }
            }
            at = part.start + next;
            if next < part.length {
                return Ok(at);
            }
            // A disk may have hundreds of files: only the one at hand keeps its tables.
            match &mut part.body {
                Body::Sparse(sparse) => sparse.forget_tables(),
                Body::SeSparse(sparse) => sparse.forget_tables(),
                Body::Flat(_) => {}
            }
        }
        Ok(at)
    }

    fn read(
        &mut self,
        io: &mut dyn BlockIo,
        extent: &Extent,
        guest_offset: u64,
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        let part = self.parts.iter_mut().find(|part| part.end() > extent.guest_offset);
        match part.map(|part| &mut part.body) {
            Some(Body::Sparse(sparse)) => sparse.read(io, extent, guest_offset, buffer),
            _ => Err(overflow("an encoded extent")),
        }
    }

    /// Each extent by itself: those that are empty already read the same as those that are not yet.
    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let mut cleared = 0;
        for part in &mut self.parts {
            if let Body::Sparse(sparse) = &mut part.body {
                cleared += sparse.empty(io)?;
            }
        }
        Ok(cleared)
    }

    fn identity(&self) -> Option<ImageId> {
        ImageId::new(&self.descriptor.text.content_id.value.to_be_bytes())
    }

    /// The ID of a parent that is yet to get it is marked: no other way tells a commit that was interrupted from a parent
    /// that was restored from a backup after one that was not. Both have the ID of before.
    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        // A disk without a parent may lie over one of another format, and records nothing of it.
        let recorded = self.descriptor.text.parent_id.as_ref().filter(|id| id.value != NO_PARENT);
        let Some(id) = recorded else { return Ok(()) };
        let bytes = identity.as_bytes().try_into().map_err(|_| overflow("the length of the parent's content ID"))?;
        let id = self.descriptor.replace(io, id, u32::from_be_bytes(bytes), stage == ParentStage::Announced)?;
        self.descriptor.text.parent_id = Some(id);
        Ok(())
    }

    fn plan_parent(&mut self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        self.steps = Some(self.parent_steps(io, parent)?);
        Ok(())
    }

    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let steps = self.steps.take().ok_or_else(|| overflow("a parent that was not planned"))?;
        self.descriptor.take(io, &steps)
    }

    /// Grains that nothing refers to are not looked for: a vmdk does not say which there are.
    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        let mut found = CheckSummary::default();
        for part in &mut self.parts {
            match &mut part.body {
                Body::Sparse(SparseSource { image, .. }) => {
                    let (surveyed, wrong) = tell_findings(finding, REST, |wrong| image.survey(io, wrong))?;
                    found.corruptions += wrong;
                    if surveyed.is_some() {
                        let (corruptions, leaks) = image.compare_copies(io, finding)?;
                        found.corruptions += corruptions;
                        found.leaks += leaks;
                    }
                }
                Body::SeSparse(sparse) => match sparse.verify(io) {
                    Err(error) if error.code == ErrorCode::OverlayCorrupt => {
                        found.corruptions += 1;
                        finding(FindingKind::Corruption, &error.text);
                    }
                    checked => drop(checked?),
                },
                Body::Flat(_) => {}
            }
        }
        Ok(found)
    }

    fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        let mut all = RepairSummary::default();
        self.mends.clear();
        for part in &mut self.parts {
            let mend = match &mut part.body {
                Body::Sparse(sparse) => {
                    let (mend, planned) = sparse.image.plan_repair(io, repair, finding)?;
                    all.corruptions += planned.corruptions;
                    all.leaks += planned.leaks;
                    mend
                }
                Body::SeSparse(sparse) => {
                    if let Err(error) = sparse.verify(io) {
                        if error.code != ErrorCode::OverlayCorrupt {
                            return Err(error);
                        }
                        finding(FindingKind::Corruption, &format!("{}: only VMware mends seSparse", error.text));
                    }
                    Mend::default()
                }
                Body::Flat(_) => Mend::default(),
            };
            self.mends.push(mend);
        }
        Ok(all)
    }

    /// Each extent by itself: none says anything of another one.
    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        for (part, mend) in self.parts.iter().zip(core::mem::take(&mut self.mends)) {
            if let Body::Sparse(sparse) = &part.body {
                sparse.image.repair(io, mend)?;
            }
        }
        Ok(())
    }
}
