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
