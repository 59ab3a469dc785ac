//! Extents and parents at the border: records of numbers on the way out, checked on the way in.

use super::{call, protocol, protocol_of};
use crate::extent::{checked_end, Content, Extent};
use crate::extents::unknown_kind;
use crate::{Bitmap, DriverError, DriverResult, Parent};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null;
use core::slice;
use instar_guest_abi::{
    BitmapOps, DirtyRange, ErrorCode, ExtentKind, Failure, WireBitmap, WireExtent, WireParent, BITMAP_NAME_MAX,
};

/// The record of an extent. What a kind does not have is 0.
pub(super) fn to_wire(extent: &Extent) -> WireExtent {
    let (location, device) = match extent.content {
        Content::Data { device, offset } => (offset, device),
        Content::Zero => (0, 0),
        Content::Encoded { location } => (location, 0),
        Content::Memory { address } => (address, 0),
    };
    let Extent { guest_offset, length, content } = *extent;
    WireExtent { guest_offset, length, location, kind: content.kind() as u32, device }
}

/// The extent that a record is of; `None` for a kind that does not exist.
pub(super) fn from_wire(record: &WireExtent) -> Option<Extent> {
    let WireExtent { guest_offset, length, location, kind, device } = *record;
    let content = match ExtentKind::from_u32(kind)? {
        ExtentKind::Data => Content::Data { device, offset: location },
        ExtentKind::Zero => Content::Zero,
        ExtentKind::Encoded => Content::Encoded { location },
        ExtentKind::Memory => Content::Memory { address: location },
    };
    Some(Extent { guest_offset, length, content })
}

/// The records that a source enumerated from guest byte `from` on.
///
/// # Errors
/// What is wrong with the first one of a kind that does not exist.
pub(super) fn enumerated(records: &[WireExtent], from: u64) -> Result<Vec<Extent>, String> {
    let extent = |(index, record): (usize, &WireExtent)| {
        from_wire(record).ok_or_else(|| unknown_kind(index, records.len(), from, record.kind))
    };
    records.iter().enumerate().map(extent).collect()
}

/// The extents that arrive at a sink, each with a known kind and a length.
///
/// # Errors
/// A protocol error that names the first one that is wrong.
///
/// # Safety
/// `records` is null or points to `count` records.
pub(super) unsafe fn arriving(records: *const WireExtent, count: usize) -> DriverResult<Vec<Extent>> {
    if records.is_null() {
        return if count == 0 { Ok(Vec::new()) } else { Err(super::protocol("extents at a null address")) };
    }
    // SAFETY: the caller promises `count` records.
    let records = unsafe { slice::from_raw_parts(records, count) };
    let extent = |(index, record): (usize, &WireExtent)| {
        let WireExtent { guest_offset, length, kind, .. } = *record;
        let Some(extent) = from_wire(record) else {
            return Err(super::protocol(&format!("extent {index} of {count} is of the unknown kind {kind}")));
        };
        if length == 0 || checked_end(guest_offset, length, u64::MAX).is_none() {
            let text = format!("extent {index} of {count} is {length} bytes long at guest byte {guest_offset}");
            return Err(super::protocol(&text));
        }
        Ok(extent)
    };
    records.iter().enumerate().map(extent).collect()
}

/// The record of a parent, which points to what the parent borrows.
pub(super) fn parent_to_wire(parent: &Parent<'_>) -> WireParent {
    WireParent {
        name: parent.name.as_ptr(),
        name_length: parent.name.len(),
        format: parent.format.as_ptr(),
        format_length: parent.format.len(),
        identity: parent.identity.as_ref().map_or(null(), core::ptr::from_ref),
        virtual_size: parent.virtual_size,
    }
}

/// The parent that a record is of; `None` if its name or format is empty, or is not what it should be.
///
/// # Safety
/// Name, format and identity of `record` are each null or readable, for as long as it is borrowed.
pub(super) unsafe fn parent_from_wire(record: &WireParent) -> Option<Parent<'_>> {
    let WireParent { name, name_length, format, format_length, identity, virtual_size } = *record;
    if name.is_null() || format.is_null() || name_length == 0 || format_length == 0 {
        return None;
    }
    // SAFETY: the caller promises it.
    let (name, format, identity) = unsafe {
        (slice::from_raw_parts(name, name_length), slice::from_raw_parts(format, format_length), identity.as_ref())
    };
    let format = core::str::from_utf8(format).ok()?;
    (!name.contains(&0)).then_some(Parent { name, format, identity: identity.copied(), virtual_size })
}

/// The record of a bitmap, which points to what the bitmap owns.
pub(super) fn bitmap_to_wire(bitmap: &Bitmap) -> WireBitmap {
    WireBitmap {
        name: bitmap.name.as_ptr(),
        name_length: bitmap.name.len(),
        granularity: bitmap.granularity,
        enabled: u32::from(bitmap.enabled),
        inconsistent: u32::from(bitmap.inconsistent),
    }
}

/// The bitmap that a record is of; `None` for a name or a granularity that no bitmap has.
///
/// # Safety
/// The name is null or readable.
pub(super) unsafe fn bitmap_from_wire(record: &WireBitmap) -> Option<Bitmap> {
    let named = !record.name.is_null() && (1..=BITMAP_NAME_MAX).contains(&record.name_length);
    if !named || !record.granularity.is_power_of_two() {
        return None;
    }
    // SAFETY: the caller promises that it is readable.
    let name = unsafe { slice::from_raw_parts(record.name, record.name_length) };
    Some(Bitmap::new(name.to_vec(), record.granularity, record.enabled != 0, record.inconsistent != 0))
}

/// The dirty ranges that arrive at a sink.
///
/// # Errors
/// A protocol error if they are not ascending.
///
/// # Safety
/// `ranges` is null or points to `count` records, which live for `'a`.
pub(super) unsafe fn dirty_from_wire<'a>(ranges: *const DirtyRange, count: usize) -> DriverResult<&'a [DirtyRange]> {
    if count == 0 {
        return Ok(&[]);
    }
    if ranges.is_null() {
        return Err(protocol("dirty ranges at a null address"));
    }
    // SAFETY: the caller promises `count` records.
    let ranges = unsafe { slice::from_raw_parts(ranges, count) };
    let mut after = 0;
    for range in ranges {
        if range.start < after || range.end <= range.start {
            return Err(protocol("dirty ranges that are not ascending"));
        }
        after = range.end;
    }
    Ok(ranges)
}

/// Hand bitmaps to another module.
pub(super) fn each_bitmap(bitmaps: &[Bitmap], ops: &BitmapOps) {
    for bitmap in bitmaps {
        let record = bitmap_to_wire(bitmap);
        (ops.add)(ops.context, &raw const record);
    }
}

/// Bytes of names of the bitmaps of an image, at most.
const ALL_NAMES: usize = 4 << 20;

/// Where the bitmaps of another module go.
#[derive(Default)]
struct Collected {
    bitmaps: Vec<Bitmap>,
    bytes: usize,
    wrong: bool,
    too_many: bool,
}

extern "C" fn add_bitmap(context: *mut c_void, bitmap: *const WireBitmap) {
    // SAFETY: `context` is the one that `collected` passed, which lives until it returns; the record is readable.
    let (collected, record) = unsafe { (context.cast::<Collected>().as_mut(), bitmap.as_ref()) };
    let Some(collected) = collected else { return };
    // SAFETY: the interface makes what a record points to readable.
    let Some(bitmap) = record.and_then(|record| unsafe { bitmap_from_wire(record) }) else {
        collected.wrong = true;
        return;
    };
    collected.bytes = collected.bytes.saturating_add(bitmap.name.len() + size_of::<Bitmap>());
    collected.too_many |= collected.bytes > ALL_NAMES;
    if !collected.too_many {
        collected.bitmaps.push(bitmap);
    }
}

/// The bitmaps that a function of the module of `device` hands over.
///
/// # Errors
/// Those of the function; [`ErrorCode::ScratchTooSmall`] for too many; a protocol error.
pub(super) fn collected(
    device: u32,
    function: impl FnOnce(*const BitmapOps, *mut Failure) -> u32,
) -> DriverResult<Vec<Bitmap>> {
    let mut collected = Collected::default();
    let ops = BitmapOps { context: (&raw mut collected).cast(), add: add_bitmap };
    call(|failure| function(&raw const ops, failure))?;
    if collected.wrong {
        return Err(protocol_of(device, "it returned a bitmap without a name, or with a granularity that is none"));
    }
    if collected.too_many {
        let text = "it has too many bitmaps, or too long names of them, to merge them: leave out --bitmaps";
        return Err(DriverError { device: Some(device), ..DriverError::new(ErrorCode::ScratchTooSmall, text) });
    }
    Ok(collected.bitmaps)
}
