//! A format of another module.

use super::{protocol, ForeignSink, ForeignSource};
use crate::{DriverError, DriverResult};
use core::mem::MaybeUninit;
use instar_guest_abi::{DeviceConfig, ErrorCode, FormatOps, SinkOps, SourceOps};

/// A format of another module, which opens images as [`ForeignSource`] and [`ForeignSink`].
#[derive(Clone, Copy)]
pub struct ForeignFormat {
    source: Option<SourceOps>,
    sink: Option<SinkOps>,
}

impl ForeignFormat {
    /// Wrap the tables of a format.
    ///
    /// # Safety
    /// `ops` is null or points to tables that live as long as the guest, each valid for the `size` it names.
    ///
    /// # Errors
    /// [`ErrorCode::GuestProtocol`] for a null table or one that is too short.
    pub unsafe fn new(ops: *const FormatOps) -> DriverResult<Self> {
        // SAFETY: the caller promises null or a live table.
        let ops = unsafe { ops.as_ref() }.ok_or_else(|| protocol("the module does not implement a format"))?;
        // SAFETY: as above; `size` is the first field of every version of the tables.
        let sizes = unsafe { (ops.source.cast::<u32>().as_ref().copied(), ops.sink.cast::<u32>().as_ref().copied()) };
        let complete = |size: Option<u32>, needed: usize| size.is_none_or(|size| size as usize >= needed);
        if !complete(sizes.0, SourceOps::MIN_SIZE) || !complete(sizes.1, SinkOps::MIN_SIZE) {
            return Err(protocol("the module's tables are too short"));
        }
        // SAFETY: as above, as long as their sizes say; what both lack are functions that may be null.
        let (source, sink) = unsafe {
            (sizes.0.map(|size| copy(ops.source, size as usize)), sizes.1.map(|size| copy(ops.sink, size as usize)))
        };
        Ok(Self { source, sink })
    }

    /// Whether the format can be read and emptied.
    #[must_use]
    pub fn has_source(&self) -> bool {
        self.source.is_some()
    }

    /// Whether the format can be committed into.
    #[must_use]
    pub fn has_sink(&self) -> bool {
        self.sink.is_some()
    }

    /// Open an image as source.
    ///
    /// # Errors
    /// Those of the driver; [`ErrorCode::UnsupportedFormat`] if the format has no source.
    pub fn open_source(&self, device: &DeviceConfig) -> DriverResult<ForeignSource> {
        let ops =
            self.source.ok_or_else(|| DriverError::new(ErrorCode::UnsupportedFormat, "the format cannot be read"))?;
        ForeignSource::open(ops, device)
    }

    /// Open an image as sink; `has_backing` tells whether it has ancestors.
    ///
    /// # Errors
    /// Those of the driver; [`ErrorCode::UnsupportedFormat`] if the format has no sink.
    pub fn open_sink(&self, device: &DeviceConfig, has_backing: bool) -> DriverResult<ForeignSink> {
        let ops =
            self.sink.ok_or_else(|| DriverError::new(ErrorCode::UnsupportedFormat, "the format cannot be written"))?;
        ForeignSink::open(ops, device, has_backing)
    }
}

/// A table of this version from one that may be shorter (null in place of what it lacks) or longer.
///
/// # Safety
/// `ops` is readable for `size` bytes, and all that follows in a `T` may be zero.
pub(super) unsafe fn copy<T>(ops: *const T, size: usize) -> T {
    let mut copy = MaybeUninit::<T>::zeroed();
    // SAFETY: both are long enough. What stays zero may be zero.
    unsafe {
        copy.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(ops.cast(), size.min(size_of::<T>()));
        copy.assume_init()
    }
}
