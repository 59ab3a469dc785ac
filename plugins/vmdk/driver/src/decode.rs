//! Reading compressed grains.

use crate::image::Image;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult};
use instar_vmdk_format::{decode_grain, GrainMarker};

/// Bytes that are read at once where grains follow each other in the file, if that is no great part of the heap: every image
/// of a chain may hold so much.
const READ_AHEAD: u64 = 1 << 20;
/// See [`READ_AHEAD`].
const PART_OF_HEAP: u64 = 32;

/// Reads the compressed grains of one image; keeps the last one, and what was read ahead.
#[derive(Default, Debug)]
pub struct GrainReader {
    input: Vec<u8>,
    input_at: u64,
    grain: Vec<u8>,
    held: Option<u64>,
}

impl GrainReader {
    /// Fill `buffer` with the bytes from `start` on of the grain at byte `offset` of the file, of which the disk has the first
    /// `visible`.
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] if the stream does not decode to a grain; I/O errors.
    pub fn read(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        offset: u64,
        (start, visible): (u64, u64),
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        if self.held != Some(offset) {
            self.held = None;
            self.decode(io, image, offset, visible)?;
            self.held = Some(offset);
        }
        let start = usize::try_from(start).map_err(|_| overflow("an offset in a grain"))?;
        let part = start.checked_add(buffer.len()).and_then(|end| self.grain.get(start..end));
        buffer.copy_from_slice(part.ok_or_else(|| overflow("a part of a grain"))?);
        Ok(())
    }

    fn decode(&mut self, io: &mut dyn BlockIo, image: &Image, offset: u64, visible: u64) -> DriverResult<()> {
        let size = usize::try_from(image.layout.grain_bytes()).map_err(|_| overflow("the grain size"))?;
        let failed = |text: String| Err(DriverError::new(ErrorCode::ParseFailed, text).at(image.device, offset));
        let marker = self.load(io, image, offset, GrainMarker::BYTES as u64)?;
        let marker = GrainMarker::parse(marker.first_chunk().ok_or_else(|| overflow("a marker"))?);
        let length = u64::from(marker.length);
        // What does not compress becomes a little longer.
        if length > image.layout.grain_bytes().saturating_mul(2).saturating_add(64) {
            return failed(format!("a compressed grain of {length} bytes is longer than can be"));
        }
        self.load(io, image, offset, marker.stored())?;
        let mut grain = core::mem::take(&mut self.grain);
        grain.resize(size, 0);
        let stream = self.load(io, image, offset + GrainMarker::BYTES as u64, length)?;
        let decoded = decode_grain(stream, &mut grain, visible);
        self.grain = grain;
        decoded.or_else(|error| failed(error.text))
    }

    /// `length` bytes at `offset` of the file; past its end are zeroes.
    fn load(&mut self, io: &mut dyn BlockIo, image: &Image, offset: u64, length: u64) -> DriverResult<&[u8]> {
        let held_end = self.input_at + self.input.len() as u64;
        let end = offset.checked_add(length).ok_or_else(|| overflow("a compressed grain"))?;
        if offset < self.input_at || end > held_end {
            let ahead = READ_AHEAD.min(io.heap_free() as u64 / PART_OF_HEAP);
            let to = offset.saturating_add(ahead).min(image.file_length).max(end);
            let count = usize::try_from(to - offset).map_err(|_| overflow("a compressed grain"))?;
            // The old one goes first.
            self.input = Vec::new();
            let mut input = vec![0; count];
            io.read(image.device, offset, &mut input)?;
            (self.input, self.input_at) = (input, offset);
        }
        let start = usize::try_from(offset - self.input_at).map_err(|_| overflow("a compressed grain"))?;
        let count = usize::try_from(length).map_err(|_| overflow("a compressed grain"))?;
        self.input.get(start..start + count).ok_or_else(|| overflow("a compressed grain"))
    }
}
