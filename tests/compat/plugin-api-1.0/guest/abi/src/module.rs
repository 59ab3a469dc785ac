//! The binary interface between guest modules: what a format driver offers to the operation.
//!
//! A module's ELF entry point is `extern "C" fn(*const CallTable) -> *const ModuleDescriptor`. It is called
//! once, before anything else of the module. All pointers in the descriptor live as long as the guest.
//!
//! Fallible functions return an error code (`ERROR_OK` = 0) and, when it is not zero, fill the caller's
//! [`Failure`].

use crate::{CallTable, ChainConfig, DeviceConfig, OperationConfig};
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

/// Longest detail text of a [`Failure`] in bytes.
pub const FAILURE_TEXT_MAX: usize = 208;

/// Why a call failed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Failure {
    /// An `ERROR_*` code.
    pub code: u32,
    /// The device concerned, or `u32::MAX`.
    pub device: u32,
    /// Byte offset on the device, or `u64::MAX`.
    pub offset: u64,
    /// errno of the host for an I/O error, else 0.
    pub errno: u32,
    /// Bytes of `text` in use.
    pub text_len: u32,
    /// UTF-8: one clause that names the field and what is wrong with it.
    pub text: [u8; FAILURE_TEXT_MAX],
}

impl Failure {
    /// No failure.
    #[must_use]
    pub const fn none() -> Self {
        Self { code: 0, device: u32::MAX, offset: u64::MAX, errno: 0, text_len: 0, text: [0; FAILURE_TEXT_MAX] }
    }
}

/// What a [`WireExtent`] holds. Stored as `u32` in [`WireExtent::kind`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExtentKind {
    /// Plain bytes at `location` of `device`.
    Data = 1,
    /// Reads as zeroes.
    Zero = 2,
    /// Allocated, but only the source can decode it (compressed): ask [`SourceOps::read`].
    Encoded = 3,
    /// Plain bytes in guest memory at address `location`.
    Memory = 4,
}

impl ExtentKind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Data,
            2 => Self::Zero,
            3 => Self::Encoded,
            4 => Self::Memory,
            _ => return None,
        })
    }
}

/// A run of guest bytes that a layer holds itself, as it crosses from module to module. Drivers see the SDK's `Extent`, whose
/// content is an enum.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WireExtent {
    /// Guest offset in bytes.
    pub guest_offset: u64,
    /// Length in bytes, at least 1, not past the virtual size.
    pub length: u64,
    /// Byte offset on `device`, or address, depending on `kind`; private to the source for `Encoded`.
    pub location: u64,
    /// An [`ExtentKind`] as a number.
    pub kind: u32,
    /// The device for `Data`.
    pub device: u32,
}

/// What a driver knows of an open image.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Cluster or grain size in bytes: the unit in which the format allocates; 1 for raw.
    pub cluster_size: u64,
}

/// What a sink found out while planning.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanSummary {
    /// Upper bound of the file's length in bytes when everything is written.
    pub final_length: u64,
    /// Clusters that will be allocated for data.
    pub new_data_clusters: u64,
    /// Clusters that will be allocated for metadata.
    pub new_metadata_clusters: u64,
    /// Mapping tables of the image that were not read because that would cost more than the commit: damage in them goes
    /// unnoticed.
    pub unread_tables: u64,
}

/// Longest [`ImageId`] in bytes.
pub const IMAGE_ID_MAX: usize = 32;

/// Which content an image has, as its format tells it (the content ID of a vmdk): bytes that are only compared, and that
/// only drivers of the format take apart.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ImageId {
    length: u32,
    bytes: [u8; IMAGE_ID_MAX],
}

impl ImageId {
    /// The identity with these bytes; `None` if there are none, or more than [`IMAGE_ID_MAX`].
    #[must_use]
    pub fn new(id: &[u8]) -> Option<Self> {
        let mut bytes = [0; IMAGE_ID_MAX];
        bytes.get_mut(..id.len()).filter(|_| !id.is_empty())?.copy_from_slice(id);
        Some(Self { length: u32::try_from(id.len()).ok()?, bytes })
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        usize::try_from(self.length).ok().and_then(|length| self.bytes.get(..length)).unwrap_or_default()
    }
}

impl core::fmt::Debug for ImageId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "ImageId({:02x?})", self.as_bytes())
    }
}

/// How far a commit is that changes the identity of a source's parent. Passed as `u32`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParentStage {
    /// The parent is about to get the identity, and then what the source holds. Until it is [`Reached`](Self::Reached), the
    /// source keeps everything that it holds, so that the parent may have its old identity as well.
    Announced = 1,
    /// The parent has the identity, and holds durably what was committed: no other one goes with the source any more.
    Reached = 2,
}

impl ParentStage {
    /// The stage with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Announced,
            2 => Self::Reached,
            _ => return None,
        })
    }
}

/// What an examination found, in numbers. What a format does not count is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckSummary {
    /// Where the last cluster that is in use, or has a refcount, ends: bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a cluster in the file.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Of these, those that are compressed.
    pub compressed_clusters: u64,
    /// What is wrong and may lose data.
    pub corruptions: u64,
    /// Clusters that are allocated and that nothing refers to.
    pub leaks: u64,
    /// Bytes of the file behind `image_end_offset`: nobody's, but they may take space. Whole clusters.
    pub unused_tail: u64,
}

/// What a finding is. Passed as `u32`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// Data may be lost.
    Corruption = 1,
    /// Space is wasted.
    Leak = 2,
}

impl FindingKind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Corruption,
            2 => Self::Leak,
            _ => return None,
        })
    }
}

/// What a repair mends. Passed as `u32`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Leaks alone.
    Leaks = 1,
    /// Leaks, and corruptions as far as nothing is lost by it.
    All = 2,
}

impl Repair {
    /// The repair with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Leaks,
            2 => Self::All,
            _ => return None,
        })
    }
}

/// What a repair mends, counted as [`CheckSummary`] counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairSummary {
    /// Corruptions that are mended.
    pub corruptions: u64,
    /// Leaks that are mended.
    pub leaks: u64,
    /// Upper bound of the file's length in bytes while it is mended and afterwards; 0 for no longer than it is.
    pub final_length: u64,
}

/// What an image is to record of its parent.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WireParent {
    /// The parent's name: `name_length` bytes, without a zero byte.
    pub name: *const u8,
    /// At least 1.
    pub name_length: usize,
    /// Name of the parent's format, UTF-8: `format_length` bytes.
    pub format: *const u8,
    /// At least 1.
    pub format_length: usize,
    /// The parent's identity, or null if it has none.
    pub identity: *const ImageId,
    /// Virtual size of the parent in bytes.
    pub virtual_size: u64,
}

/// Takes the findings of an examination, one at a time.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FindingOps {
    /// Passed back to `add`.
    pub context: *mut c_void,
    /// A finding: a [`FindingKind`] as a number and one line of UTF-8 of `length` bytes.
    pub add: extern "C" fn(context: *mut c_void, kind: u32, text: *const u8, length: usize),
}

/// A persistent bitmap of an image: which granules of the disk were written to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WireBitmap {
    /// Its name: `name_length` bytes, which may be any.
    pub name: *const u8,
    /// 1 to [`BITMAP_NAME_MAX`].
    pub name_length: usize,
    /// Bytes of the disk that a bit stands for: a power of two.
    pub granularity: u64,
    /// 1: writes to the disk are recorded in it.
    pub enabled: u32,
    /// 1: it was not saved when the image was closed, and says nothing.
    pub inconsistent: u32,
}

/// Longest name of a bitmap in bytes.
pub const BITMAP_NAME_MAX: usize = 1023;

/// Takes the bitmaps of an image, one at a time.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BitmapOps {
    /// Passed back to `add`.
    pub context: *mut c_void,
    /// A bitmap, which is read before `add` returns.
    pub add: extern "C" fn(context: *mut c_void, bitmap: *const WireBitmap),
}

/// Guest bytes that a bitmap calls dirty.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyRange {
    /// The first byte.
    pub start: u64,
    /// The byte after the last; greater than `start`.
    pub end: u64,
}

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
    /// Record, durably, that the parent's identity becomes `*identity`. `stage` is a [`ParentStage`] as a number: called
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
    /// Find out what of a [`Repair`] can be mended, and how. Changes nothing. What cannot be mended without losing something is
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
