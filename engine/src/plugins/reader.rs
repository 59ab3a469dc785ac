//! What a plugin's host half may read.

use std::io;

/// An image that a plugin looks at. The engine opened it; a plugin opens no file itself.
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
    /// An image of which one file is looked at.
    #[must_use]
    pub fn one(first: &'a dyn ImageRead) -> Self {
        Self { first, others: &[] }
    }
}
