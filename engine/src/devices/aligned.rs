//! Memory for direct I/O, which wants it aligned.

/// Alignment in memory, in bytes: as much as any file system asks for.
pub const MEMORY: usize = 4096;

/// A buffer that begins at a multiple of [`MEMORY`].
#[derive(Debug)]
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// A buffer of this many bytes, all zero.
    pub fn new(length: u64) -> Self {
        let length = usize::try_from(length).unwrap_or(usize::MAX - MEMORY);
        let bytes = vec![0; length + MEMORY];
        let start = bytes.as_ptr().align_offset(MEMORY).min(MEMORY);
        Self { bytes, start, length }
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}
