//! Reading compressed grains.

use crate::image::Image;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DecodeAhead, Decoder, DriverError, DriverResult, LastCluster};
use instar_vmdk_format::{Decompressor, FormatError, GrainError, GrainMarker};

/// Bytes that are read at once where grains follow each other in the file, if that is no great part of the heap: every image
/// of a chain may hold so much.
const READ_AHEAD: u64 = 1 << 20;
/// See [`READ_AHEAD`].
const PART_OF_HEAP: u64 = 32;

/// Reads the compressed grains of one image; keeps the last one, what was read ahead, and the grains that come
/// [next](DecodeAhead).
#[derive(Default, Debug)]
pub struct GrainReader {
    ahead: DecodeAhead<GrainDecoder>,
    input: Vec<u8>,
    input_at: u64,
    last: LastCluster<u64>,
}

/// Decodes grains of a disk.
struct GrainDecoder {
    decompressor: Decompressor,
    virtual_size: u64,
}

impl GrainDecoder {
    fn of(image: &Image) -> Self {
        Self { decompressor: Decompressor::default(), virtual_size: image.layout.virtual_size() }
    }

    /// Decode the grain at guest offset `guest`, the last of which the disk may have a part of.
    fn decode_stream(&mut self, guest: u64, stream: &[u8], grain: &mut [u8]) -> Result<(), GrainError> {
        let visible = (grain.len() as u64).min(self.virtual_size.saturating_sub(guest));
        self.decompressor.decode(stream, grain, visible)
    }
}

impl Decoder for GrainDecoder {
    fn decode(&mut self, guest: u64, stored: &[u8], grain: &mut [u8]) -> bool {
        let Some((marker, rest)) = stored.split_first_chunk() else { return false };
        let stream = usize::try_from(GrainMarker::parse(marker).length).ok().and_then(|length| rest.get(..length));
        // A damaged stream is decoded once more, for the text of the error.
        stream.is_some_and(|stream| self.decode_stream(guest, stream, grain).is_ok())
    }
}

impl GrainReader {
    /// An enumeration begins at guest byte `from`: its grains will be asked for in this order, if at all.
    pub fn enumerate(&mut self, from: u64) {
        self.ahead.enumerate(from);
    }

    /// The next grain of the enumeration, at byte `offset` of the file.
    pub fn note(&mut self, image: &Image, guest: u64, offset: u64) {
        let end = offset.saturating_add(GrainMarker::longest(image.layout.grain_bytes()));
        self.ahead.note(guest, offset, offset..end.min(image.file_length));
    }

    /// Fill `buffer` with the bytes from `start` on of the grain at guest offset `guest` and byte `offset` of the file.
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] if the stream does not decode to a grain; I/O errors.
    pub fn read(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (guest, offset): (u64, u64),
        start: u64,
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        let size = usize::try_from(image.layout.grain_bytes()).map_err(|_| overflow("the grain size"))?;
        let mut last = core::mem::take(&mut self.last);
        let read = last.read(offset, size, start, buffer, |cluster| self.decode(io, image, (guest, offset), cluster));
        self.last = last;
        read
    }

    /// Decode a whole grain.
    fn decode(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (guest, offset): (u64, u64),
        grain: &mut [u8],
    ) -> DriverResult<()> {
        if self.ahead.take(io, image.device, (guest, offset), grain, &|| GrainDecoder::of(image))? {
            return Ok(());
        }
        let failed = |text: String| Err(DriverError::new(ErrorCode::ParseFailed, text).at(image.device, offset));
        let range = self.load(io, image, offset, GrainMarker::BYTES as u64)?;
        let marker = self.input.get(range).and_then(<[u8]>::first_chunk).ok_or_else(|| overflow("a marker"))?;
        let marker = GrainMarker::parse(marker);
        let length = u64::from(marker.length);
        // What does not compress becomes a little longer.
        if length > image.layout.grain_bytes().saturating_mul(2).saturating_add(64) {
            return failed(format!("a compressed grain of {length} bytes is longer than can be"));
        }
        let range = self.load(io, image, offset, marker.stored())?;
        let stream = self.input.get(range).and_then(|stored| stored.get(GrainMarker::BYTES..));
        let stream = stream.ok_or_else(|| overflow("a compressed grain"))?;
        let decoder = self.ahead.own(io, &|| GrainDecoder::of(image)).ok_or_else(|| overflow("a decoder"))?;
        decoder.decode_stream(guest, stream, grain).or_else(|error| failed(FormatError::from(error).text))
    }

    /// Have `length` bytes at `offset` of the file in memory; returns where they stand in `input`. Past its end are zeroes.
    fn load(&mut self, io: &mut dyn BlockIo, image: &Image, offset: u64, length: u64) -> DriverResult<Range<usize>> {
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
        Ok(start..start.saturating_add(count))
    }
}
