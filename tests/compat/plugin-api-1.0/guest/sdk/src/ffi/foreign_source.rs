//! A source of another module.

use super::wire::{collected, enumerated, parent_to_wire, to_wire};
use super::{call, protocol_of, MAX_EXTENTS};
use crate::extents::check_extents;
use crate::{check_dirty, Bitmap, BlockIo, DirtyRanges, DriverError, DriverResult, Extent, Extents, Parent, Source};
use alloc::format;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ops::Range;
use core::ptr::{null, null_mut};
use instar_guest_abi::{
    CheckSummary, DeviceConfig, DirtyRange, ErrorCode, Failure, FindingKind, FindingOps, ImageId, ImageInfo,
    ParentStage, Repair, RepairSummary, SourceOps, WireExtent,
};

/// A source of another module. It does its block I/O itself: the `io` of the calls is not used.
pub struct ForeignSource {
    ops: SourceOps,
    handle: *mut c_void,
    /// The image's device, by which the host knows the module.
    device: u32,
}

impl ForeignSource {
    /// The module broke a promise of the interface.
    fn broken(&self, why: &str) -> DriverError {
        protocol_of(self.device, why)
    }

    pub(super) fn open(ops: SourceOps, device: &DeviceConfig) -> DriverResult<Self> {
        let mut handle = null_mut();
        call(|failure| (ops.open)(device, &raw mut handle, failure))?;
        if handle.is_null() {
            return Err(protocol_of(device.device, "it opened a source without a handle"));
        }
        Ok(Self { ops, handle, device: device.device })
    }
}

impl ForeignSource {
    /// Call a function of the module that tells findings.
    fn with_findings(
        &self,
        finding: &mut dyn FnMut(FindingKind, &str),
        function: impl FnOnce(*const FindingOps, *mut Failure) -> u32,
    ) -> DriverResult<()> {
        let mut findings = Findings { sink: finding, wrong: false };
        let ops = FindingOps { context: (&raw mut findings).cast(), add: add_finding };
        call(|failure| function(&raw const ops, failure))?;
        if findings.wrong {
            return Err(self.broken("it returned a finding of unknown kind, or one that is no text"));
        }
        Ok(())
    }
}

impl Drop for ForeignSource {
    fn drop(&mut self) {
        (self.ops.close)(self.handle);
    }
}

impl Source for ForeignSource {
    fn info(&self) -> ImageInfo {
        let mut info = ImageInfo::default();
        (self.ops.info)(self.handle, &raw mut info);
        info
    }

    fn verify(&mut self, _: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        let mut clusters = 0;
        call(|failure| (self.ops.verify)(self.handle, u32::from(will_empty), &raw mut clusters, failure))?;
        Ok(clusters)
    }

    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let capacity = out.room().min(MAX_EXTENTS);
        let mut records: Vec<WireExtent> = Vec::with_capacity(capacity);
        let (mut count, mut next) = (0, 0);
        let room = records.spare_capacity_mut().as_mut_ptr().cast::<WireExtent>();
        let Range { start: from, end } = range;
        call(|failure| {
            (self.ops.extents)(self.handle, from, end, room, capacity, &raw mut count, &raw mut next, failure)
        })?;
        if count > capacity {
            return Err(self.broken(&format!("it returned {count} extents, and was asked for {capacity}")));
        }
        // SAFETY: the module filled `count` records of the reserved room.
        unsafe { records.set_len(count) };
        let found = enumerated(&records, from).map_err(|why| self.broken(&why))?;
        check_extents(&found, from, next, self.info().virtual_size).map_err(|why| self.broken(&why))?;
        // There is room for all of them.
        let taken = found.into_iter().all(|extent| out.push(extent));
        debug_assert!(taken);
        Ok(next)
    }

    fn read(&mut self, _: &mut dyn BlockIo, extent: &Extent, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let (record, address, length) = (to_wire(extent), buffer.as_mut_ptr(), buffer.len());
        call(|failure| (self.ops.read)(self.handle, &raw const record, guest_offset, address, length, failure))
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        let mut cleared = 0;
        call(|failure| (self.ops.empty)(self.handle, &raw mut cleared, failure))?;
        Ok(cleared)
    }

    fn identity(&self) -> Option<ImageId> {
        let mut identity = ImageId::new(&[0])?;
        self.ops.identity.filter(|own| own(self.handle, &raw mut identity) == 1)?;
        // Once more, because the module may have written anything as the length.
        ImageId::new(identity.as_bytes())
    }

    fn follow_parent(&mut self, _: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        let follow = self.ops.follow_parent;
        follow.map_or(Ok(()), |follow| call(|failure| follow(self.handle, identity, stage as u32, failure)))
    }

    fn check(&mut self, _: &mut dyn BlockIo, finding: &mut dyn FnMut(FindingKind, &str)) -> DriverResult<CheckSummary> {
        let check = self.ops.check.ok_or_else(|| lacking("checked"))?;
        let mut found = CheckSummary::default();
        self.with_findings(finding, |findings, failure| check(self.handle, findings, &raw mut found, failure))?;
        Ok(found)
    }

    fn plan_repair(
        &mut self,
        _: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        let plan = self.ops.plan_repair.ok_or_else(|| lacking("repaired"))?;
        let mut mended = RepairSummary::default();
        self.with_findings(finding, |findings, failure| {
            plan(self.handle, repair as u32, findings, &raw mut mended, failure)
        })?;
        Ok(mended)
    }

    fn repair(&mut self, _: &mut dyn BlockIo) -> DriverResult<()> {
        let repair = self.ops.repair.ok_or_else(|| lacking("repaired"))?;
        call(|failure| repair(self.handle, failure))
    }

    fn plan_parent(&mut self, _: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        let plan = self.ops.plan_parent.ok_or_else(|| lacking("given another parent"))?;
        let record = parent.map(parent_to_wire);
        let record = record.as_ref().map_or(null(), core::ptr::from_ref);
        call(|failure| plan(self.handle, record, failure))
    }

    fn set_parent(&mut self, _: &mut dyn BlockIo) -> DriverResult<()> {
        let set = self.ops.set_parent.ok_or_else(|| lacking("given another parent"))?;
        call(|failure| set(self.handle, failure))
    }

    fn bitmaps(&mut self, _: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        let Some(bitmaps) = self.ops.bitmaps else { return Ok(Vec::new()) };
        collected(self.device, |ops, failure| bitmaps(self.handle, ops, failure))
    }

    fn dirty(&mut self, _: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        let dirty = self.ops.dirty.ok_or_else(|| lacking("asked for bitmaps"))?;
        let capacity = out.most().min(MAX_EXTENTS);
        let mut records = alloc::vec![DirtyRange::default(); capacity];
        let (mut count, mut next) = (0, 0);
        let room = records.as_mut_ptr();
        call(|failure| dirty(self.handle, index, from, room, capacity, &raw mut count, &raw mut next, failure))?;
        let found = records.get(..count);
        let found =
            found.ok_or_else(|| self.broken(&format!("it returned {count} ranges, and was asked for {capacity}")))?;
        check_dirty(found, from, next, self.info().virtual_size).map_err(|why| self.broken(&why))?;
        let taken = found.iter().all(|range| out.push(range.start, range.end));
        debug_assert!(taken);
        Ok(next)
    }
}

/// The plugin is older than what is wanted of it.
fn lacking(what: &str) -> DriverError {
    let text = format!("images of this format cannot be {what} with this version of its plugin");
    DriverError::new(ErrorCode::NotImplemented, text)
}

/// Where the findings of another module go.
struct Findings<'a> {
    sink: &'a mut dyn FnMut(FindingKind, &str),
    wrong: bool,
}

extern "C" fn add_finding(context: *mut c_void, kind: u32, text: *const u8, length: usize) {
    // SAFETY: `context` is the one that `check` passed, which lives until it returns; the module does not keep it.
    let Some(findings) = (unsafe { context.cast::<Findings<'_>>().as_mut() }) else { return };
    if text.is_null() {
        findings.wrong = true;
        return;
    }
    // SAFETY: the interface makes `length` bytes at `text` readable.
    let text = unsafe { core::slice::from_raw_parts(text, length) };
    match (FindingKind::from_u32(kind), core::str::from_utf8(text)) {
        (Some(kind), Ok(text)) => (findings.sink)(kind, text),
        _ => findings.wrong = true,
    }
}
