//! The binary interface between guest modules: what a format driver offers to the operation.
//!
//! A module's ELF entry point is `extern "C" fn(*const CallTable) -> *const ModuleDescriptor`. It is called
//! once, before anything else of the module. All pointers in the descriptor live as long as the guest.
//!
//! Fallible functions return an error code (`ERROR_OK` = 0) and, when it is not zero, fill the caller's
//! [`Failure`].

use crate::{
    BitmapOps, CallTable, ChainConfig, CheckSummary, DeviceConfig, DirtyRange, Failure, FindingOps, ImageId, ImageInfo,
    OperationConfig, PlanSummary, RepairSummary, WireBitmap, WireExtent, WireParent,
};
use core::ffi::c_void;
use core::mem::offset_of;

/// [`ModuleDescriptor::magic`]: `"INSTMODU"`.
pub const MODULE_MAGIC: u64 = u64::from_le_bytes(*b"INSTMODU");
/// Changes when a module built before cannot be loaded any more.
pub const MODULE_ABI_MAJOR: u32 = 1;
/// Rises when a table gets a new entry. A side that lacks it does without: modules and hosts of all minor versions work
/// together, except where [`MODULE_ABI_LEAST_MINOR`] says otherwise.
pub const MODULE_ABI_MINOR: u32 = 0;
/// The oldest minor version of a host in which a module of this version works. It rises only if the SDK comes to need something
/// that was appended to [`CallTable`].
pub const MODULE_ABI_LEAST_MINOR: u32 = 0;

/// The source role: enumerate what an image holds, read it, empty it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SourceOps {
    /// `size_of::<SourceOps>()` of the module that made it.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Open the image on the device. On success `*out` is the handle for the other calls.
    pub open: extern "C" fn(device: *const DeviceConfig, out: *mut *mut c_void, failure: *mut Failure) -> u32,
    /// Free the handle.
    pub close: extern "C" fn(source: *mut c_void),
    /// Facts of the open image.
    pub info: extern "C" fn(source: *mut c_void, out: *mut ImageInfo),
    /// Verify all metadata of an image that is to be committed (and emptied, if `will_empty` is not 0);
    /// changes nothing. `*clusters` is set to the number of clusters that the image holds.
    pub verify: extern "C" fn(source: *mut c_void, will_empty: u32, clusters: *mut u64, failure: *mut Failure) -> u32,
    /// Enumerate what the layer itself holds of the guest bytes `from..end`, in ascending order, adjacent runs merged, at
    /// most `capacity` extents; the first may begin before `from`, and the last may end after `end`. `*next` is set to the
    /// guest byte at which to continue: greater than `from`, `end` or more once the range is exhausted.
    pub extents: extern "C" fn(
        source: *mut c_void,
        from: u64,
        end: u64,
        out: *mut WireExtent,
        capacity: usize,
        count: *mut usize,
        next: *mut u64,
        failure: *mut Failure,
    ) -> u32,
    /// Decode `length` bytes of an `Encoded` extent, from `guest_offset` on, into `buffer`.
    pub read: extern "C" fn(
        source: *mut c_void,
        extent: *const WireExtent,
        guest_offset: u64,
        buffer: *mut u8,
        length: usize,
        failure: *mut Failure,
    ) -> u32,
    /// Empty the image and give its space back; durable when it returns. `*cleared` is set to the number
    /// of clusters that were dropped.
    pub empty: extern "C" fn(source: *mut c_void, cleared: *mut u64, failure: *mut Failure) -> u32,
    /// Null: images of the format have no identity. Sets `*identity` to the image's, which is what the host half has as
    /// `ImageFacts::identity`, and returns 1; or returns 0.
    pub identity: Option<extern "C" fn(source: *mut c_void, identity: *mut ImageId) -> u32>,
    /// Null: the image does not record its parent's identity.
    /// Record, durably, that the parent's identity becomes `*identity`. `stage` is a [`ParentStage`](crate::ParentStage) as a number: called
    /// before the first write to the parent, and again with the same identity when the last one is durable.
    pub follow_parent:
        Option<extern "C" fn(source: *mut c_void, identity: *const ImageId, stage: u32, failure: *mut Failure) -> u32>,
    /// Null: images of the format cannot be examined.
    /// Look at all metadata for a report, and change nothing: what is wrong is a finding and not a failure.
    pub check: Option<
        extern "C" fn(
            source: *mut c_void,
            findings: *const FindingOps,
            out: *mut CheckSummary,
            failure: *mut Failure,
        ) -> u32,
    >,
    /// Null: images of the format record no parent that could be another one.
    /// Verify that the image can record `*parent` in place of the parent that it has, or none if `parent` is null. Changes nothing.
    pub plan_parent:
        Option<extern "C" fn(source: *mut c_void, parent: *const WireParent, failure: *mut Failure) -> u32>,
    /// Null exactly if `plan_parent` is. Record what `plan_parent` accepted last; durable when it returns, and at every instant
    /// before the image names the one parent or the other, whole.
    pub set_parent: Option<extern "C" fn(source: *mut c_void, failure: *mut Failure) -> u32>,
    /// Null: images of the format cannot be repaired.
    /// Find out what of a [`Repair`](crate::Repair) can be mended, and how. Changes nothing. What cannot be mended without losing something is
    /// a finding that says what would be lost.
    pub plan_repair: Option<
        extern "C" fn(
            source: *mut c_void,
            repair: u32,
            findings: *const FindingOps,
            out: *mut RepairSummary,
            failure: *mut Failure,
        ) -> u32,
    >,
    /// Null exactly if `plan_repair` is. Mend what `plan_repair` counted last; durable when it returns, and at every instant
    /// before the image reads as it did and has nothing worse than it had.
    pub repair: Option<extern "C" fn(source: *mut c_void, failure: *mut Failure) -> u32>,
    /// Null: images of the format have no persistent bitmaps.
    /// Hand all bitmaps to `bitmaps`, in an order that stays the same. Changes nothing.
    pub bitmaps: Option<extern "C" fn(source: *mut c_void, bitmaps: *const BitmapOps, failure: *mut Failure) -> u32>,
    /// Null exactly if `bitmaps` is. Enumerate what the bitmap with this index calls dirty from guest byte `from` on, ascending
    /// and apart from each other, at most `capacity` ranges, none of which begins before `from`. `*next` is set to the guest byte
    /// at which to continue: greater than `from`, the virtual size once the bitmap is exhausted.
    pub dirty: Option<
        extern "C" fn(
            source: *mut c_void,
            bitmap: u32,
            from: u64,
            out: *mut DirtyRange,
            capacity: usize,
            count: *mut usize,
            next: *mut u64,
            failure: *mut Failure,
        ) -> u32,
    >,
}

impl SourceOps {
    /// Size in bytes of the table of minor version 0, up to its last function: whatever is appended leaves this as it is. A
    /// function that is appended later is missing from such a table, and counts as not supported.
    pub const MIN_SIZE: usize = offset_of!(Self, dirty) + size_of::<usize>();
}

/// Reads the guest-visible bytes below the output image (its ancestors; zeroes where there are none).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ReadBelowOps {
    /// Passed back to `read`.
    pub context: *mut c_void,
    /// Fill `buffer` with `length` bytes at `guest_offset`.
    pub read: extern "C" fn(
        context: *mut c_void,
        guest_offset: u64,
        buffer: *mut u8,
        length: usize,
        failure: *mut Failure,
    ) -> u32,
    /// 1 if there is any ancestor, 0 if everything below reads as zeroes.
    pub exists: u32,
    /// Zero.
    pub reserved: u32,
}

/// The sink role: receive data, allocate, write, make durable.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SinkOps {
    /// `size_of::<SinkOps>()` of the module that made it.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Open the image on the device; changes nothing. `has_backing` is 1 if the image has ancestors.
    pub open: extern "C" fn(
        device: *const DeviceConfig,
        has_backing: u32,
        out: *mut *mut c_void,
        failure: *mut Failure,
    ) -> u32,
    /// Free the handle.
    pub close: extern "C" fn(sink: *mut c_void),
    /// Facts of the open image.
    pub info: extern "C" fn(sink: *mut c_void, out: *mut ImageInfo),
    /// Look at what these extents will touch: verify that metadata and count what must be allocated.
    /// Changes nothing. Called with ascending extents for the whole commit before the first `write`.
    pub plan: extern "C" fn(sink: *mut c_void, extents: *const WireExtent, count: usize, failure: *mut Failure) -> u32,
    /// End of planning: everything that can refuse has been asked when this returns. Changes nothing.
    pub planned: extern "C" fn(sink: *mut c_void, out: *mut PlanSummary, failure: *mut Failure) -> u32,
    /// Write the extents (kinds `Data`, `Zero` and `Memory`), in ascending order over all calls, such that the
    /// image is consistent after a crash between any two of its writes (`docs/commit.md`, "The steps"). What it wrote may be durable only after `finish`.
    pub write: extern "C" fn(
        sink: *mut c_void,
        extents: *const WireExtent,
        count: usize,
        below: *const ReadBelowOps,
        failure: *mut Failure,
    ) -> u32,
    /// Everything is durable when this returns.
    pub finish: extern "C" fn(sink: *mut c_void, failure: *mut Failure) -> u32,
    /// Null: this sink cannot grow. Called before the first
    /// `plan`, changes nothing: from here on the image counts as `virtual_size` bytes long, and the first `write`, which
    /// may be one of no extents, makes it so. What lies below the image reads as zeroes from byte `below_length` on.
    pub grow:
        Option<extern "C" fn(sink: *mut c_void, virtual_size: u64, below_length: u64, failure: *mut Failure) -> u32>,
    /// Null: the image has no identity that changes. Sets
    /// `*identity` to the one that the image gets with the first `write` of any extents, and returns 1; or returns 0. `child`
    /// is the identity of the image that data comes from, or null: of several, that of the lowest.
    pub next_identity: Option<extern "C" fn(sink: *mut c_void, child: *const ImageId, identity: *mut ImageId) -> u32>,
    /// Null: this sink cannot shrink. Called in the place of `grow`, changes nothing: from here on the image counts as
    /// `virtual_size` bytes long, fewer than it has, and the first `write`, one of no extents, makes it so.
    pub shrink: Option<extern "C" fn(sink: *mut c_void, virtual_size: u64, failure: *mut Failure) -> u32>,
    /// Null: images of the format can have no persistent bitmaps.
    /// Hand all bitmaps to `bitmaps`, as [`SourceOps::bitmaps`]. Changes nothing.
    pub bitmaps: Option<extern "C" fn(sink: *mut c_void, bitmaps: *const BitmapOps, failure: *mut Failure) -> u32>,
    /// Null exactly if `bitmaps` is. Verify that these granules can be called dirty by the bitmap of this name, which is made
    /// with this granularity if there is none, and count what must be allocated for that. Changes nothing. Called after `grow`
    /// and before the first `plan`, for one bitmap after the other, each with ascending ranges over all calls, the first of which
    /// may have none.
    pub plan_bitmap: Option<
        extern "C" fn(
            sink: *mut c_void,
            bitmap: *const WireBitmap,
            dirty: *const DirtyRange,
            count: usize,
            failure: *mut Failure,
        ) -> u32,
    >,
    /// Null exactly if `bitmaps` is. Do what `plan_bitmap` was asked for, called in the same way after the last `write`: durable,
    /// bitmaps that are made included, once `finish` returns; a bitmap that is made is not there before it has all its bits.
    pub merge_bitmap: Option<
        extern "C" fn(
            sink: *mut c_void,
            bitmap: *const WireBitmap,
            dirty: *const DirtyRange,
            count: usize,
            failure: *mut Failure,
        ) -> u32,
    >,
}

impl SinkOps {
    /// Size in bytes of the table of minor version 0, as [`SourceOps::MIN_SIZE`].
    pub const MIN_SIZE: usize = offset_of!(Self, merge_bitmap) + size_of::<usize>();
}

/// What a format module offers; a null role is not offered.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FormatOps {
    /// The source role, or null.
    pub source: *const SourceOps,
    /// The sink role, or null.
    pub sink: *const SinkOps,
}

/// What an operation module offers.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct OperationOps {
    /// Run the operation. `formats[i]` belongs to entry `i` of the module table, null where that entry is
    /// not a format. The operation reports its result with a message before it returns.
    pub run: extern "C" fn(
        table: *const CallTable,
        config: *const OperationConfig,
        chain: *const ChainConfig,
        formats: *const *const FormatOps,
        format_count: usize,
    ),
}

/// Kind of a module. Stored as `u32` in [`ModuleDescriptor::kind`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// [`ModuleDescriptor::ops`] points to [`FormatOps`].
    Format = 1,
    /// [`ModuleDescriptor::ops`] points to [`OperationOps`].
    Operation = 2,
}

/// What a module's entry returns.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ModuleDescriptor {
    /// [`MODULE_MAGIC`].
    pub magic: u64,
    /// [`MODULE_ABI_MAJOR`] that the module was built with.
    pub abi_major: u32,
    /// [`MODULE_ABI_MINOR`] that the module was built with.
    pub abi_minor: u32,
    /// A [`ModuleKind`] as a number.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
    /// [`FormatOps`] or [`OperationOps`].
    pub ops: *const c_void,
}

// SAFETY: the descriptors and tables are immutable statics of a single-threaded guest; the pointers in them
// point to other immutable statics.
unsafe impl Sync for ModuleDescriptor {}
// SAFETY: as for `ModuleDescriptor`.
unsafe impl Sync for FormatOps {}
