//! A sink of another module.

use super::below::LentBelow;
use super::wire::{bitmap_to_wire, collected, to_wire};
use super::{call, protocol_of};
use crate::{Bitmap, BlockIo, DriverError, DriverResult, Extent, ReadBelow, Sink};
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use instar_guest_abi::{DeviceConfig, DirtyRange, ErrorCode, ImageId, ImageInfo, PlanSummary, SinkOps, WireExtent};

/// A sink of another module. It does its block I/O itself: the `io` of the calls serves only to read the layers
/// below.
pub struct ForeignSink {
    ops: SinkOps,
    handle: *mut c_void,
    /// The image's device, by which the host knows the module.
    device: u32,
}

impl ForeignSink {
    pub(super) fn open(ops: SinkOps, device: &DeviceConfig, has_backing: bool) -> DriverResult<Self> {
        let mut handle = null_mut();
        call(|failure| (ops.open)(device, u32::from(has_backing), &raw mut handle, failure))?;
        if handle.is_null() {
            return Err(protocol_of(device.device, "it opened a sink without a handle"));
        }
        Ok(Self { ops, handle, device: device.device })
    }
}

impl Drop for ForeignSink {
    fn drop(&mut self) {
        (self.ops.close)(self.handle);
    }
}

impl Sink for ForeignSink {
    fn info(&self) -> ImageInfo {
        let mut info = ImageInfo::default();
        (self.ops.info)(self.handle, &raw mut info);
        info
    }

    fn plan(&mut self, _: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        let records: Vec<WireExtent> = extents.iter().map(to_wire).collect();
        call(|failure| (self.ops.plan)(self.handle, records.as_ptr(), records.len(), failure))
    }

    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let mut summary = PlanSummary::default();
        call(|failure| (self.ops.planned)(self.handle, &raw mut summary, failure))?;
        Ok(summary)
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        let records: Vec<WireExtent> = extents.iter().map(to_wire).collect();
        let mut lent = LentBelow::new(io, below);
        let table = lent.table();
        call(|failure| (self.ops.write)(self.handle, records.as_ptr(), records.len(), &raw const table.ops, failure))
    }

    fn grow(&mut self, _: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        let Some(grow) = self.ops.grow else {
            return Err(DriverError::new(
                ErrorCode::UnsupportedFormat,
                "this version of the format's plugin grows no images",
            ));
        };
        call(|failure| grow(self.handle, virtual_size, below_length, failure))
    }

    fn shrink(&mut self, _: &mut dyn BlockIo, virtual_size: u64) -> DriverResult<()> {
        let Some(shrink) = self.ops.shrink else {
            return Err(DriverError::new(
                ErrorCode::UnsupportedFormat,
                "this version of the format's plugin shrinks no images",
            ));
        };
        call(|failure| shrink(self.handle, virtual_size, failure))
    }

    fn next_identity(&mut self, child: Option<&ImageId>) -> Option<ImageId> {
        let mut identity = ImageId::new(&[0])?;
        let child = child.map_or(core::ptr::null(), core::ptr::from_ref);
        self.ops.next_identity.filter(|next| next(self.handle, child, &raw mut identity) == 1)?;
        // Once more, because the module may have written anything as the length.
        ImageId::new(identity.as_bytes())
    }

    fn bitmaps(&mut self, _: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        let bitmaps = self.ops.bitmaps.ok_or_else(|| lacks_bitmaps(self.device))?;
        collected(self.device, |ops, failure| bitmaps(self.handle, ops, failure))
    }

    fn plan_bitmap(&mut self, _: &mut dyn BlockIo, bitmap: &Bitmap, dirty: &[DirtyRange]) -> DriverResult<()> {
        let (plan, record) = (self.ops.plan_bitmap.ok_or_else(|| lacks_bitmaps(self.device))?, bitmap_to_wire(bitmap));
        call(|failure| plan(self.handle, &raw const record, dirty.as_ptr(), dirty.len(), failure))
    }

    fn merge_bitmap(&mut self, _: &mut dyn BlockIo, bitmap: &Bitmap, dirty: &[DirtyRange]) -> DriverResult<()> {
        let (merge, record) =
            (self.ops.merge_bitmap.ok_or_else(|| lacks_bitmaps(self.device))?, bitmap_to_wire(bitmap));
        call(|failure| merge(self.handle, &raw const record, dirty.as_ptr(), dirty.len(), failure))
    }

    fn finish(&mut self, _: &mut dyn BlockIo) -> DriverResult<()> {
        call(|failure| (self.ops.finish)(self.handle, failure))
    }
}

/// The plugin is older than what is wanted of it.
fn lacks_bitmaps(device: u32) -> DriverError {
    let text = "this version of the format's plugin merges no bitmaps: leave out --bitmaps";
    DriverError { device: Some(device), ..DriverError::new(ErrorCode::NotImplemented, text) }
}
