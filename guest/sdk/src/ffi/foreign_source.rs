//! A source of another module.

use super::{call, protocol, MAX_EXTENTS};
use crate::{BlockIo, DriverError, DriverResult, Source};
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ops::Range;
use core::ptr::null_mut;
use instar_guest_abi::{
    DeviceConfig, ErrorCode, Examination, Extent, ExtentKind, FindingKind, FindingOps, ImageId, ImageInfo, ParentStage,
    SourceOps,
};

/// A source of another module. It does its block I/O itself: the `io` of the calls is not used.
pub struct ForeignSource {
    ops: SourceOps,
    handle: *mut c_void,
}

impl ForeignSource {
    pub(super) fn open(ops: SourceOps, device: &DeviceConfig) -> DriverResult<Self> {
        let mut handle = null_mut();
        call(|failure| (ops.open)(device, &raw mut handle, failure))?;
        if handle.is_null() {
            return Err(protocol("the module opened a source without a handle"));
        }
        Ok(Self { ops, handle })
    }
}

impl Drop for ForeignSource {
    fn drop(&mut self) {
        (self.ops.close)(self.handle);
    }
}

/// Whether `found`, enumerated from `from` on with `next` as the place to go on, is what the interface promises of an
/// image of `size` bytes.
fn plausible(found: &[Extent], from: u64, next: u64, size: u64) -> bool {
    let mut after = from;
    for (index, extent) in found.iter().enumerate() {
        // The first extent may begin before `from`, in the middle of a run.
        let Some(end) = extent.guest_offset.checked_add(extent.length) else { return false };
        let source_kind = matches!(
            ExtentKind::from_u32(extent.kind),
            Some(ExtentKind::Data | ExtentKind::Zero | ExtentKind::Encoded)
        );
        if extent.length == 0 || !source_kind || end <= after || (index > 0 && extent.guest_offset < after) {
            return false;
        }
        after = end;
    }
    let inside = found.is_empty() || after <= size;
    // Enumeration must advance, or be at the end.
    inside && next >= after && (next > from || from >= size)
}

impl Source for ForeignSource {
    fn info(&self) -> ImageInfo {
        let mut info = ImageInfo::default();
        (self.ops.info)(self.handle, &raw mut info);
        info
    }

    fn check(&mut self, _: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        let mut clusters = 0;
        call(|failure| (self.ops.check)(self.handle, u32::from(will_empty), &raw mut clusters, failure))?;
        Ok(clusters)
    }

    fn extents(
        &mut self,
        _: &mut dyn BlockIo,
        range: Range<u64>,
        max: usize,
        out: &mut Vec<Extent>,
    ) -> DriverResult<u64> {
        let capacity = max.min(MAX_EXTENTS);
        let start = out.len();
        out.reserve(capacity);
        let (mut count, mut next) = (0, 0);
        let room = out.spare_capacity_mut().as_mut_ptr().cast::<Extent>();
        let Range { start: from, end } = range;
        call(|failure| {
            (self.ops.extents)(self.handle, from, end, room, capacity, &raw mut count, &raw mut next, failure)
        })?;
        if count > capacity {
            return Err(protocol("the module returned more extents than asked for"));
        }
        // SAFETY: the module filled `count` extents of the reserved room.
        unsafe { out.set_len(start + count) };
        let found = out.get(start..).unwrap_or_default();
        if !plausible(found, from, next, self.info().virtual_size) {
            return Err(protocol(
                "the module returned extents out of order or bounds, of unknown kind, or does not advance",
            ));
        }
        Ok(next)
    }

    fn read(&mut self, _: &mut dyn BlockIo, extent: &Extent, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let (address, length) = (buffer.as_mut_ptr(), buffer.len());
        call(|failure| (self.ops.read)(self.handle, extent, guest_offset, address, length, failure))
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        let mut cleared = 0;
        call(|failure| (self.ops.empty)(self.handle, &raw mut cleared, failure))?;
        Ok(cleared)
    }

    fn follow_parent(&mut self, _: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        let follow = self.ops.follow_parent;
        follow.map_or(Ok(()), |follow| call(|failure| follow(self.handle, identity, stage as u32, failure)))
    }

    fn examine(
        &mut self,
        _: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<Examination> {
        let Some(examine) = self.ops.examine else {
            let text = "images of this format cannot be checked with this version of its plugin";
            return Err(DriverError::new(ErrorCode::NotImplemented, text));
        };
        let mut findings = Findings { sink: finding, wrong: false };
        let ops = FindingOps { context: (&raw mut findings).cast(), add: add_finding };
        let mut found = Examination::default();
        call(|failure| examine(self.handle, &raw const ops, &raw mut found, failure))?;
        if findings.wrong {
            return Err(protocol("the module returned a finding of unknown kind, or one that is no text"));
        }
        Ok(found)
    }
}

/// Where the findings of another module go.
struct Findings<'a> {
    sink: &'a mut dyn FnMut(FindingKind, &str),
    wrong: bool,
}

extern "C" fn add_finding(context: *mut c_void, kind: u32, text: *const u8, length: usize) {
    // SAFETY: `context` is the one that `examine` passed, which lives until it returns; the module does not keep it.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(guest_offset: u64, length: u64, kind: u32) -> Extent {
        Extent { guest_offset, length, location: 0, kind, device: 0 }
    }

    #[test]
    fn only_ascending_known_extents_are_plausible() {
        assert!(plausible(&[], 0, 100, 100));
        assert!(plausible(&[extent(0, 10, 1), extent(10, 5, 2), extent(20, 5, 3)], 0, 25, 25));
        assert!(plausible(&[extent(0, 10, 1)], 5, 10, 25));
        assert!(!plausible(&[extent(0, 10, 1), extent(9, 5, 1)], 0, 25, 25));
        assert!(!plausible(&[extent(20, 6, 1)], 0, 26, 25), "past the virtual size");
        assert!(!plausible(&[], 5, 5, 25), "does not advance");
        assert!(plausible(&[], 25, 25, 25));
        assert!(!plausible(&[extent(0, 0, 1)], 0, 25, 25));
        assert!(!plausible(&[extent(0, 1, 4)], 0, 25, 25), "memory is not for sources");
        assert!(!plausible(&[extent(0, 1, 9)], 0, 25, 25));
        assert!(!plausible(&[extent(u64::MAX, 2, 1)], 0, u64::MAX, u64::MAX));
        assert!(!plausible(&[extent(0, 10, 1)], 0, 9, 25));
    }
}
