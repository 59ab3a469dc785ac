//! A [`Sink`] as a table of C functions.

use super::below::TableBelow;
use super::wire::{arriving, bitmap_from_wire, dirty_from_wire, each_bitmap};
use super::{done, finish, protocol, store};
use crate::{Bitmap, BlockIo, DriverResult, FormatDriver, Sink};
use alloc::boxed::Box;
use core::ffi::c_void;
use instar_guest_abi::{
    BitmapOps, DeviceConfig, DirtyRange, Failure, ImageId, ImageInfo, PlanSummary, ReadBelowOps, SinkOps, WireBitmap,
    WireExtent,
};

#[allow(clippy::cast_possible_truncation, reason = "a table is some dozens of bytes")]
const SIZE: u32 = size_of::<SinkOps>() as u32;

/// Make the sink table of driver `D`, whose functions do block I/O through their own `Io`.
#[must_use]
pub const fn sink_ops<D: FormatDriver, Io: BlockIo + Default>() -> SinkOps {
    SinkOps {
        size: SIZE,
        reserved: 0,
        open: open::<D, Io>,
        close: close::<D::Sink>,
        info: info::<D::Sink>,
        plan: plan::<D::Sink, Io>,
        planned: planned::<D::Sink, Io>,
        write: write::<D::Sink, Io>,
        finish: finish_all::<D::Sink, Io>,
        grow: Some(grow::<D::Sink, Io>),
        next_identity: Some(next_identity::<D::Sink>),
        shrink: Some(shrink::<D::Sink, Io>),
        bitmaps: Some(bitmaps::<D::Sink, Io>),
        plan_bitmap: Some(plan_bitmap::<D::Sink, Io>),
        merge_bitmap: Some(merge_bitmap::<D::Sink, Io>),
    }
}

/// The open sink that a handle stands for.
///
/// # Safety
/// `sink` is null or a handle from [`open`] for the same `S`, not closed, not in use by another call.
unsafe fn handle<'a, S>(sink: *mut c_void) -> Option<&'a mut S> {
    // SAFETY: the caller promises that it is null or a live `S`.
    unsafe { sink.cast::<S>().as_mut() }
}

extern "C" fn open<D: FormatDriver, Io: BlockIo + Default>(
    device: *const DeviceConfig,
    has_backing: u32,
    out: *mut *mut c_void,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes null or a readable configuration.
    let device = unsafe { device.as_ref() };
    let (Some(device), false) = (device, out.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("open of a sink without device or result"), failure) };
    };
    let result = D::open_sink(&mut Io::default(), device, has_backing != 0)
        .map(|sink| Box::into_raw(Box::new(Padded { sink, _byte: 0 })).cast::<c_void>());
    // SAFETY: `out` is not null, so the interface makes it writable; `failure` is null or writable.
    unsafe { finish(result, out, failure) }
}

/// The sink and a byte, so that a handle is never the address of nothing.
#[repr(C)]
struct Padded<S> {
    sink: S,
    _byte: u8,
}

extern "C" fn close<S: Sink>(sink: *mut c_void) {
    if !sink.is_null() {
        // SAFETY: the interface passes a handle from `open`, once.
        drop(unsafe { Box::from_raw(sink.cast::<Padded<S>>()) });
    }
}

extern "C" fn info<S: Sink>(sink: *mut c_void, out: *mut ImageInfo) {
    // SAFETY: the interface passes a live handle and a writable result.
    if let (Some(sink), Some(out)) = unsafe { (handle::<S>(sink), out.as_mut()) } {
        *out = sink.info();
    }
}

extern "C" fn plan<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    extents: *const WireExtent,
    count: usize,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle and `count` extents.
    let (sink, extents) = unsafe { (handle::<S>(sink), arriving(extents, count)) };
    let result = match sink {
        Some(sink) => extents.and_then(|extents| sink.plan(&mut Io::default(), &extents)),
        None => Err(protocol("plan without sink")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn planned<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    out: *mut PlanSummary,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle.
    let (Some(sink), false) = (unsafe { handle::<S>(sink) }, out.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("planned without sink or result"), failure) };
    };
    let result = sink.planned(&mut Io::default());
    // SAFETY: `out` is not null, so the interface makes it writable; `failure` is null or writable.
    unsafe { finish(result, out, failure) }
}

extern "C" fn write<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    extents: *const WireExtent,
    count: usize,
    below: *const ReadBelowOps,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle, `count` extents and a readable table.
    let (sink, extents, below) = unsafe { (handle::<S>(sink), arriving(extents, count), below.as_ref()) };
    let result = match (sink, below) {
        (Some(sink), Some(below)) => {
            extents.and_then(|extents| sink.write(&mut Io::default(), &extents, &mut TableBelow::new(*below)))
        }
        _ => Err(protocol("write without sink or layers below")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn finish_all<S: Sink, Io: BlockIo + Default>(sink: *mut c_void, failure: *mut Failure) -> u32 {
    // SAFETY: the interface passes a live handle.
    let result = match unsafe { handle::<S>(sink) } {
        Some(sink) => sink.finish(&mut Io::default()),
        None => Err(protocol("finish without sink")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn grow<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    virtual_size: u64,
    below_length: u64,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle.
    let result = match unsafe { handle::<S>(sink) } {
        Some(sink) => sink.grow(&mut Io::default(), virtual_size, below_length),
        None => Err(protocol("grow without sink")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn shrink<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    virtual_size: u64,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle.
    let result = match unsafe { handle::<S>(sink) } {
        Some(sink) => sink.shrink(&mut Io::default(), virtual_size),
        None => Err(protocol("shrink without sink")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn next_identity<S: Sink>(sink: *mut c_void, child: *const ImageId, identity: *mut ImageId) -> u32 {
    // SAFETY: the interface passes a live handle, null or a readable identity, and a writable result.
    let (sink, child, identity) = unsafe { (handle::<S>(sink), child.as_ref(), identity.as_mut()) };
    match (sink.and_then(|sink| sink.next_identity(child)), identity) {
        (Some(next), Some(out)) => {
            *out = next;
            1
        }
        _ => 0,
    }
}

extern "C" fn bitmaps<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    bitmaps: *const BitmapOps,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle and readable functions.
    let result = match unsafe { (handle::<S>(sink), bitmaps.as_ref()) } {
        (Some(sink), Some(ops)) => sink.bitmaps(&mut Io::default()).map(|found| each_bitmap(&found, ops)),
        _ => Err(protocol("bitmaps without sink or receiver")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

/// What arrives with a bitmap: the sink, the bitmap, and what it calls dirty.
///
/// # Safety
/// `sink` is as for [`handle`]; `bitmap` is null or readable, with what it points to; `dirty` has `count` records.
unsafe fn with_bitmap<'a, S: Sink>(
    sink: *mut c_void,
    bitmap: *const WireBitmap,
    dirty: *const DirtyRange,
    count: usize,
) -> DriverResult<(&'a mut S, Bitmap, &'a [DirtyRange])> {
    // SAFETY: passed on from the caller.
    unsafe {
        let sink = handle::<S>(sink).ok_or_else(|| protocol("a bitmap without sink"))?;
        let bitmap = bitmap.as_ref().and_then(|record| bitmap_from_wire(record));
        let bitmap = bitmap.ok_or_else(|| protocol("a record that is no bitmap"))?;
        Ok((sink, bitmap, dirty_from_wire(dirty, count)?))
    }
}

extern "C" fn plan_bitmap<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    bitmap: *const WireBitmap,
    dirty: *const DirtyRange,
    count: usize,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle, a readable bitmap and `count` ranges.
    let arrived = unsafe { with_bitmap::<S>(sink, bitmap, dirty, count) };
    let result = arrived.and_then(|(sink, bitmap, dirty)| sink.plan_bitmap(&mut Io::default(), &bitmap, dirty));
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn merge_bitmap<S: Sink, Io: BlockIo + Default>(
    sink: *mut c_void,
    bitmap: *const WireBitmap,
    dirty: *const DirtyRange,
    count: usize,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle, a readable bitmap and `count` ranges.
    let arrived = unsafe { with_bitmap::<S>(sink, bitmap, dirty, count) };
    let result = arrived.and_then(|(sink, bitmap, dirty)| sink.merge_bitmap(&mut Io::default(), &bitmap, dirty));
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}
