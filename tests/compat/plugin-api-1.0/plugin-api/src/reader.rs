//! The reader that the engine passes to a plugin.

use crate::guard::guarded;
use crate::{ErrorCode, PluginError};
use abi_stable::std_types::{RResult, RSlice, RSliceMut};
use abi_stable::StableAbi;
use std::ffi::c_void;
use std::marker::PhantomData;

/// Maximum number of bytes that a plugin may read in one call from the engine. Each read counts for at least 512 bytes.
pub const READ_BUDGET: u64 = 8 << 20;

/// The source of an [`ImageReader`]'s bytes. The engine implements it; the tests of a plugin may.
///
/// # Example
///
/// An image of many terabytes for the test of a plugin, which exists only as its first bytes:
///
/// ```
/// use instar_plugin_api::{ImageReader, PluginError, ReadImage};
///
/// struct Huge;
///
/// impl ReadImage for Huge {
///     fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
///         buffer.fill(if offset == 0 { b'D' } else { 0 });
///         Ok(buffer.len())
///     }
/// }
///
/// let image = ImageReader::new(1 << 44, &Huge);
/// assert_eq!(image.read_vec(0, 4).ok(), Some(b"DDDD".to_vec()));
/// ```
pub trait ReadImage {
    /// Read up to `buffer.len()` bytes at `offset`; fewer only at the end of the image.
    ///
    /// # Errors
    /// When the image cannot be read, or more was read than a plugin may.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError>;

    /// Do the same for the image's other file with this index.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn read_file_at(&self, file: usize, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        let _ = (offset, buffer);
        Err(PluginError::new(ErrorCode::InternalOverflow, format!("the image has no file {file}")))
    }
}

impl ReadImage for [u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or(&[]);
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

impl ReadImage for Vec<u8> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        self.as_slice().read_at(offset, buffer)
    }
}

/// Bounded read access to an open image, for the duration of the call that gets it.
#[repr(C)]
#[derive(StableAbi)]
pub struct ImageReader<'a> {
    length: u64,
    context: *const c_void,
    read: unsafe extern "C" fn(context: *const c_void, file: u64, offset: u64, buffer: RSliceMut<'_, u8>) -> ReadResult,
    /// 0 for the file that the image is named by, else 1 and the index among the others.
    file: u64,
    /// Lengths in bytes of the other files.
    others: RSlice<'a, u64>,
    lifetime: PhantomData<&'a c_void>,
}

/// Number of bytes read, or why not.
type ReadResult = RResult<u64, PluginError>;

/// Calls [`ReadImage::read_at`] or [`ReadImage::read_file_at`] of the `T` behind `context`.
unsafe extern "C" fn read_shim<T: ReadImage>(
    context: *const c_void,
    file: u64,
    offset: u64,
    mut buffer: RSliceMut<'_, u8>,
) -> ReadResult {
    // SAFETY: `ImageReader::new` made `context` from a `&'a T`, and the reader does not outlive `'a`.
    let source = unsafe { &*context.cast::<T>() };
    let index = file.checked_sub(1).map(|index| usize::try_from(index).unwrap_or(usize::MAX));
    let read = || match index {
        None => source.read_at(offset, buffer.as_mut_slice()),
        Some(index) => source.read_file_at(index, offset, buffer.as_mut_slice()),
    };
    guarded(read).map(|length| length as u64).into()
}

impl<'a> ImageReader<'a> {
    /// Make a reader over `source`, which has `length` bytes.
    pub fn new<T: ReadImage>(length: u64, source: &'a T) -> Self {
        Self::with_files(length, &[], source)
    }

    /// Make a reader for an image in several files; `others` holds the lengths of the other files in bytes.
    pub fn with_files<T: ReadImage>(length: u64, others: &'a [u64], source: &'a T) -> Self {
        Self {
            length,
            context: std::ptr::from_ref(source).cast(),
            read: read_shim::<T>,
            file: 0,
            others: RSlice::from_slice(others),
            lifetime: PhantomData,
        }
    }

    /// Count the image's [other files](crate::FormatPlugin::files) that are open: all, or none.
    #[must_use]
    pub fn file_count(&self) -> usize {
        self.others.len()
    }

    /// Return the image's other file with this index, if it is open.
    #[must_use]
    pub fn file(&self, index: usize) -> Option<ImageReader<'a>> {
        let length = *self.others.as_slice().get(index)?;
        let file = u64::try_from(index).ok()?.checked_add(1)?;
        let Self { context, read, .. } = *self;
        Some(Self { length, context, read, file, others: RSlice::EMPTY, lifetime: PhantomData })
    }

    /// Return the length of the image file or device in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Read up to `buffer.len()` bytes at byte `offset`; fewer only at the end of the image. Returns how many.
    ///
    /// # Errors
    /// The error of the engine, to be returned unchanged: the host could not read the image, or the plugin read more than
    /// [`READ_BUDGET`] in this call.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        let capacity = buffer.len();
        // SAFETY: `read` and `context` belong together, see `new`; `self` and `buffer` outlive the call.
        let result = unsafe { (self.read)(self.context, self.file, offset, RSliceMut::from_mut_slice(buffer)) };
        match result.into_result().map(usize::try_from) {
            Ok(Ok(length)) if length <= capacity => Ok(length),
            Ok(_) => Err(PluginError::new(ErrorCode::InternalOverflow, "the engine read more than was asked for")),
            Err(error) => Err(error),
        }
    }

    /// Read exactly `buffer.len()` bytes at byte `offset`.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at), and [`ErrorCode::ParseFailed`] if the image ends too early.
    pub fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PluginError> {
        let wanted = buffer.len();
        let length = self.read_at(offset, buffer)?;
        if length == wanted {
            return Ok(());
        }
        let end = offset.saturating_add(length as u64);
        let message = format!("the file ends at byte {end}, {wanted} bytes were expected at {offset}");
        Err(PluginError::new(ErrorCode::ParseFailed, message))
    }

    /// Read up to `length` bytes at byte `offset`; fewer only at the end of the image.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at). Never allocates more than [`READ_BUDGET`].
    pub fn read_vec(&self, offset: u64, length: usize) -> Result<Vec<u8>, PluginError> {
        if length as u64 > READ_BUDGET {
            let message = format!("a read of {length} bytes is more than the {READ_BUDGET} of one call");
            return Err(PluginError::new(ErrorCode::ScratchTooSmall, message));
        }
        let available = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = length.min(available);
        let mut bytes = Vec::new();
        // The library's allocator is not the engine's, and would end the process in its own words.
        if bytes.try_reserve_exact(length).is_err() {
            let message = format!("there is no memory to read {length} bytes of it");
            return Err(PluginError::new(ErrorCode::ScratchTooSmall, message));
        }
        bytes.resize(length, 0);
        let read = self.read_at(offset, &mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }
}
