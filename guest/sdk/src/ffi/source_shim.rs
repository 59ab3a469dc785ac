//! A [`Source`] as a table of C functions.

use super::wire::{each_bitmap, from_wire, parent_from_wire, to_wire};
use super::{done, finish, protocol, store, MAX_EXTENTS};
use crate::{checked_end, BlockIo, DirtyRanges, Extent, Extents, FormatDriver, Source};
use alloc::boxed::Box;
use core::ffi::c_void;
use core::slice;
use instar_guest_abi::{
    BitmapOps, CheckSummary, DeviceConfig, DirtyRange, Failure, FindingKind, FindingOps, ImageId, ImageInfo,
    ParentStage, Repair, RepairSummary, SourceOps, WireExtent, WireParent,
};

/// What a handle points to. The byte is there so that a handle is never the address of nothing.
#[repr(C)]
struct Open<S> {
    source: S,
    _byte: u8,
}

#[allow(clippy::cast_possible_truncation, reason = "a table is some dozens of bytes")]
const SIZE: u32 = size_of::<SourceOps>() as u32;

/// Make the source table of driver `D`, whose functions do block I/O through their own `Io`.
#[must_use]
pub const fn source_ops<D: FormatDriver, Io: BlockIo + Default>() -> SourceOps {
    SourceOps {
        size: SIZE,
        reserved: 0,
        open: open::<D, Io>,
        close: close::<D::Source>,
        info: info::<D::Source>,
        verify: verify::<D::Source, Io>,
        extents: extents::<D::Source, Io>,
        read: read::<D::Source, Io>,
        empty: empty::<D::Source, Io>,
        identity: Some(identity::<D::Source>),
        follow_parent: Some(follow_parent::<D::Source, Io>),
        check: Some(check::<D::Source, Io>),
        plan_parent: Some(plan_parent::<D::Source, Io>),
        set_parent: Some(set_parent::<D::Source, Io>),
        plan_repair: Some(plan_repair::<D::Source, Io>),
        repair: Some(repair::<D::Source, Io>),
        bitmaps: Some(bitmaps::<D::Source, Io>),
        dirty: Some(dirty::<D::Source, Io>),
    }
}

/// The open source that a handle stands for.
///
/// # Safety
/// `source` is null or a handle from [`open`] for the same `S`, not closed, not in use by another call.
unsafe fn handle<'a, S>(source: *mut c_void) -> Option<&'a mut Open<S>> {
    // SAFETY: the caller promises that it is null or a live `Open<S>`.
    unsafe { source.cast::<Open<S>>().as_mut() }
}

extern "C" fn open<D: FormatDriver, Io: BlockIo + Default>(
    device: *const DeviceConfig,
    out: *mut *mut c_void,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes null or a readable configuration.
    let device = unsafe { device.as_ref() };
    let (Some(device), false) = (device, out.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("open of a source without device or result"), failure) };
    };
    let result = D::open_source(&mut Io::default(), device)
        .map(|source| Box::into_raw(Box::new(Open { source, _byte: 0 })).cast::<c_void>());
    // SAFETY: `out` is not null, so the interface makes it writable; `failure` is null or writable.
    unsafe { finish(result, out, failure) }
}

extern "C" fn close<S: Source>(source: *mut c_void) {
    if !source.is_null() {
        // SAFETY: the interface passes a handle from `open`, once.
        drop(unsafe { Box::from_raw(source.cast::<Open<S>>()) });
    }
}

extern "C" fn info<S: Source>(source: *mut c_void, out: *mut ImageInfo) {
    // SAFETY: the interface passes a live handle and a writable result.
    if let (Some(open), Some(out)) = unsafe { (handle::<S>(source), out.as_mut()) } {
        *out = open.source.info();
    }
}

extern "C" fn verify<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    will_empty: u32,
    clusters: *mut u64,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle.
    let (Some(open), false) = (unsafe { handle::<S>(source) }, clusters.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("check without source or result"), failure) };
    };
    let result = open.source.verify(&mut Io::default(), will_empty != 0);
    // SAFETY: `clusters` is not null, so the interface makes it writable; `failure` is null or writable.
    unsafe { finish(result, clusters, failure) }
}

extern "C" fn extents<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    from: u64,
    end: u64,
    out: *mut WireExtent,
    capacity: usize,
    count: *mut usize,
    next: *mut u64,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle.
    let open = unsafe { handle::<S>(source) };
    let complete = !out.is_null() && !count.is_null() && !next.is_null() && capacity > 0;
    let (Some(open), true) = (open, complete) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("extents without source, results or room"), failure) };
    };
    let mut extents = Extents::with_room_for(capacity.min(MAX_EXTENTS));
    match open.source.extents(&mut Io::default(), from..end, &mut extents) {
        Ok(after) => {
            for (index, extent) in extents.iter().enumerate() {
                // SAFETY: there are at most `capacity`, and the interface makes that many records at `out` writable.
                unsafe { out.add(index).write(to_wire(extent)) };
            }
            // SAFETY: the interface makes `count` and `next` writable.
            unsafe {
                count.write(extents.len());
                next.write(after);
            }
            0
        }
        // SAFETY: the interface passes null or a writable failure.
        Err(error) => unsafe { store(&error, failure) },
    }
}

extern "C" fn read<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    extent: *const WireExtent,
    guest_offset: u64,
    buffer: *mut u8,
    length: usize,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle and a readable extent.
    let (open, record) = unsafe { (handle::<S>(source), extent.as_ref()) };
    let (Some(open), Some(record), false) = (open, record, buffer.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("read without source, extent or buffer"), failure) };
    };
    let inside = |extent: &Extent| {
        let within = checked_end(guest_offset, length as u64, extent.end()).is_some();
        extent.is_encoded() && guest_offset >= extent.guest_offset && within
    };
    let Some(extent) = from_wire(record).filter(inside) else {
        // SAFETY: as above.
        return unsafe { store(&protocol("read outside an encoded extent"), failure) };
    };
    // SAFETY: the interface makes `length` bytes at `buffer` exclusive to this call.
    let buffer = unsafe { slice::from_raw_parts_mut(buffer, length) };
    let result = open.source.read(&mut Io::default(), &extent, guest_offset, buffer);
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn empty<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    cleared: *mut u64,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle.
    let (Some(open), false) = (unsafe { handle::<S>(source) }, cleared.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("empty without source or result"), failure) };
    };
    let result = open.source.empty(&mut Io::default());
    // SAFETY: `cleared` is not null, so the interface makes it writable; `failure` is null or writable.
    unsafe { finish(result, cleared, failure) }
}

extern "C" fn identity<S: Source>(source: *mut c_void, identity: *mut ImageId) -> u32 {
    // SAFETY: the interface passes a live handle and a writable result.
    match unsafe { (handle::<S>(source).and_then(|open| open.source.identity()), identity.as_mut()) } {
        (Some(own), Some(out)) => {
            *out = own;
            1
        }
        _ => 0,
    }
}

extern "C" fn follow_parent<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    identity: *const ImageId,
    stage: u32,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle and a readable identity.
    let (open, identity) = unsafe { (handle::<S>(source), identity.as_ref()) };
    let result = match (open, identity, ParentStage::from_u32(stage)) {
        (Some(open), Some(identity), Some(stage)) => open.source.follow_parent(&mut Io::default(), identity, stage),
        _ => Err(protocol("follow_parent without source, identity or stage")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn check<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    findings: *const FindingOps,
    out: *mut CheckSummary,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle and readable functions.
    let (open, findings) = unsafe { (handle::<S>(source), findings.as_ref()) };
    let (Some(open), Some(findings), false) = (open, findings, out.is_null()) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("check without source, findings or result"), failure) };
    };
    let result = open.source.check(&mut Io::default(), &mut adder(findings));
    // SAFETY: `out` is not null, so the interface makes it writable; `failure` is null or writable.
    unsafe { finish(result, out, failure) }
}

/// What hands a driver's findings to the caller.
fn adder(findings: &FindingOps) -> impl FnMut(FindingKind, &str) + '_ {
    |kind, text| (findings.add)(findings.context, kind as u32, text.as_ptr(), text.len())
}

extern "C" fn plan_parent<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    parent: *const WireParent,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle, and null or a readable record.
    let (open, record) = unsafe { (handle::<S>(source), parent.as_ref()) };
    let Some(open) = open else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("plan_parent without source"), failure) };
    };
    let result = match record.map(|record| {
        // SAFETY: the interface makes what a record points to readable.
        unsafe { parent_from_wire(record) }
    }) {
        Some(None) => Err(protocol("plan_parent with a record that is no parent")),
        Some(Some(parent)) => open.source.plan_parent(&mut Io::default(), Some(&parent)),
        None => open.source.plan_parent(&mut Io::default(), None),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn set_parent<S: Source, Io: BlockIo + Default>(source: *mut c_void, failure: *mut Failure) -> u32 {
    // SAFETY: the interface passes a live handle.
    let result = match unsafe { handle::<S>(source) } {
        Some(open) => open.source.set_parent(&mut Io::default()),
        None => Err(protocol("set_parent without source")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn plan_repair<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    repair: u32,
    findings: *const FindingOps,
    out: *mut RepairSummary,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle and readable functions.
    let (open, findings) = unsafe { (handle::<S>(source), findings.as_ref()) };
    let (Some(open), Some(findings), Some(repair), false) = (open, findings, Repair::from_u32(repair), out.is_null())
    else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("plan_repair without source, kind, findings or result"), failure) };
    };
    let result = open.source.plan_repair(&mut Io::default(), repair, &mut adder(findings));
    // SAFETY: `out` is not null, so the interface makes it writable; `failure` is null or writable.
    unsafe { finish(result, out, failure) }
}

extern "C" fn repair<S: Source, Io: BlockIo + Default>(source: *mut c_void, failure: *mut Failure) -> u32 {
    // SAFETY: the interface passes a live handle.
    let result = match unsafe { handle::<S>(source) } {
        Some(open) => open.source.repair(&mut Io::default()),
        None => Err(protocol("repair without source")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn bitmaps<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    bitmaps: *const BitmapOps,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle and readable functions.
    let result = match unsafe { (handle::<S>(source), bitmaps.as_ref()) } {
        (Some(open), Some(ops)) => open.source.bitmaps(&mut Io::default()).map(|found| each_bitmap(&found, ops)),
        _ => Err(protocol("bitmaps without source or receiver")),
    };
    // SAFETY: the interface passes null or a writable failure.
    unsafe { done(result, failure) }
}

extern "C" fn dirty<S: Source, Io: BlockIo + Default>(
    source: *mut c_void,
    bitmap: u32,
    from: u64,
    out: *mut DirtyRange,
    capacity: usize,
    count: *mut usize,
    next: *mut u64,
    failure: *mut Failure,
) -> u32 {
    // SAFETY: the interface passes a live handle.
    let open = unsafe { handle::<S>(source) };
    let complete = !out.is_null() && !count.is_null() && !next.is_null() && capacity > 0;
    let (Some(open), true) = (open, complete) else {
        // SAFETY: the interface passes null or a writable failure.
        return unsafe { store(&protocol("dirty without source, results or room"), failure) };
    };
    let mut ranges = DirtyRanges::with_room_for(capacity.min(MAX_EXTENTS));
    match open.source.dirty(&mut Io::default(), bitmap, from, &mut ranges) {
        Ok(after) => {
            for (index, range) in ranges.iter().enumerate() {
                // SAFETY: there are at most `capacity`, and the interface makes that many records at `out` writable.
                unsafe { out.add(index).write(*range) };
            }
            // SAFETY: the interface makes `count` and `next` writable.
            unsafe {
                count.write(ranges.len());
                next.write(after);
            }
            0
        }
        // SAFETY: the interface passes null or a writable failure.
        Err(error) => unsafe { store(&error, failure) },
    }
}
