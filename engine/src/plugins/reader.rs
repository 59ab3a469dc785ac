//! The images that a plugin's host half may read.

use std::io;

/// An image that a plugin reads. The engine opened it; a plugin opens no file itself.
///
/// # Example
///
/// An image in memory:
///
/// ```
/// use instar::plugins::ImageRead;
/// use std::io;
///
/// struct Memory(Vec<u8>);
///
/// impl ImageRead for Memory {
///     fn length(&self) -> u64 {
///         self.0.len() as u64
///     }
///
///     fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
///         let rest = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
///         let length = rest.len().min(buffer.len());
///         buffer[..length].copy_from_slice(&rest[..length]);
///         Ok(length)
///     }
/// }
///
/// let mut buffer = [0; 4];
/// assert_eq!(Memory(b"QFI\xfb and more".to_vec()).read_at(0, &mut buffer).ok(), Some(4));
/// ```
pub trait ImageRead {
    /// Length in bytes.
    fn length(&self) -> u64;

    /// Read up to `buffer.len()` bytes at `offset`; fewer only at the end of the image.
    ///
    /// # Errors
    /// I/O errors of the host.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
}

/// The files of an image: the one that it is named by, and the others, as far as they are open.
#[derive(Clone, Copy)]
pub struct ImageFiles<'a> {
    /// The file that the image is named by.
    pub first: &'a dyn ImageRead,
    /// The others: all of them, or none.
    pub others: &'a [&'a dyn ImageRead],
}

impl<'a> ImageFiles<'a> {
    /// Make the list of an image of which only one file is open.
    #[must_use]
    pub fn one(first: &'a dyn ImageRead) -> Self {
        Self { first, others: &[] }
    }
}
