//! Compressed grains: zlib streams (RFC 1950), each behind its marker.

use crate::{FormatError, GrainMarker, SECTOR};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use miniz_oxide::deflate::core::{compress, CompressorOxide, TDEFLFlush, TDEFLStatus};
use miniz_oxide::DataFormat;
use zlib_rs::{Inflate, InflateFlush, Status};

/// The levels of zlib that are tried, until the stream is no longer than it may be: the fastest, which compresses three times
/// as fast as zlib's usual one into a sixth more bytes, and the one that only stores.
const LEVELS: [u8; 2] = [1, 0];
/// The same, beginning with zlib's usual level.
const SMALL: [u8; 2] = [6, 0];

/// Any window that deflate has: 32 KiB.
const WINDOW_BITS: u8 = 15;

/// Why a stream is none of a grain. It takes no memory: grains are decoded where none may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrainError {
    /// It is no whole stream of zlib, or one of more than a grain.
    Invalid,
    /// It decodes to `count` bytes instead of `wanted`.
    Length {
        /// Bytes that it decodes to.
        count: usize,
        /// Bytes of a grain.
        wanted: usize,
    },
}

impl From<GrainError> for FormatError {
    fn from(error: GrainError) -> Self {
        match error {
            GrainError::Invalid => Self::corrupt("a compressed grain does not decode"),
            GrainError::Length { count, wanted } => {
                Self::corrupt(format!("a compressed grain decodes to {count} bytes, not {wanted}"))
            }
        }
    }
}

/// Decodes grains; its memory of some dozens of KiB is taken once.
pub struct Decompressor(Inflate);

impl Default for Decompressor {
    fn default() -> Self {
        Self(Inflate::new(true, WINDOW_BITS))
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decompressor")
    }
}

impl Decompressor {
    /// Decode a stream into a grain, of which the disk has the first `visible` bytes: QEMU stores no more than these of a disk's
    /// last one. What follows is zero.
    ///
    /// # Errors
    /// When it is no stream, or none of a grain; then the content of `grain` is arbitrary.
    pub fn decode(&mut self, stream: &[u8], grain: &mut [u8], visible: u64) -> Result<(), GrainError> {
        self.0.reset(true);
        let ended = matches!(self.0.decompress(stream, grain, InflateFlush::Finish), Ok(Status::StreamEnd));
        let count = usize::try_from(self.0.total_out()).ok().filter(|_| ended);
        let count = count.ok_or(GrainError::Invalid)?;
        if count != grain.len() && count as u64 != visible {
            return Err(GrainError::Length { count, wanted: grain.len() });
        }
        grain.iter_mut().skip(count).for_each(|byte| *byte = 0);
        Ok(())
    }
}

/// Compresses grains; its tables of some hundred KiB are made once. The same bytes always give the same stream.
#[derive(Default)]
pub struct Compressor {
    encoder: Option<Box<CompressorOxide>>,
    small: bool,
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressor").field("small", &self.small).finish_non_exhaustive()
    }
}

impl Compressor {
    /// One that takes the time of zlib's usual level, or not.
    #[must_use]
    pub const fn new(small: bool) -> Self {
        Self { encoder: None, small }
    }

    /// What is stored of a grain that begins at sector `sector` of the disk: marker and stream, padded to whole sectors,
    /// [`GrainMarker::longest`] at most. What does not shrink is in stored blocks. `None` for more bytes than any grain has.
    pub fn stored(&mut self, sector: u64, grain: &[u8]) -> Option<Vec<u8>> {
        let room = usize::try_from(GrainMarker::longest(grain.len() as u64)).ok()?;
        let mut stored = vec![0; room];
        let stream = stored.get_mut(GrainMarker::BYTES..)?;
        let compressor = self.encoder.get_or_insert_with(Box::default);
        let length = if self.small { SMALL } else { LEVELS }.iter().find_map(|&level| {
            compressor.reset();
            compressor.set_format_and_level(DataFormat::Zlib, level);
            let (status, _, length) = compress(compressor, grain, stream, TDEFLFlush::Finish);
            u32::try_from(length).ok().filter(|_| status == TDEFLStatus::Done)
        })?;
        let marker = GrainMarker { sector, length };
        stored.get_mut(..GrainMarker::BYTES)?.copy_from_slice(&marker.encode());
        stored.truncate(usize::try_from(marker.stored()).ok()?);
        stored.resize(usize::try_from(marker.stored().next_multiple_of(SECTOR)).ok()?, 0);
        // Many of them wait to be written: room that only the longest would take fills the memory of a guest.
        stored.shrink_to_fit();
        Some(stored)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The length of the stream of these bytes, which decodes to them.
    fn stream(compressor: &mut Compressor, bytes: &[u8]) -> usize {
        let stored = compressor.stored(77, bytes).unwrap();
        let marker = GrainMarker::parse(stored.first_chunk().unwrap());
        assert_eq!((marker.sector, stored.len() as u64), (77, marker.stored().next_multiple_of(512)));
        assert!(stored.capacity() < stored.len() + 4096, "{} bytes for {}", stored.capacity(), stored.len());
        let (stream, padding) = stored[12..].split_at(marker.length as usize);
        let mut decoded = vec![0xff; bytes.len()];
        Decompressor::default().decode(stream, &mut decoded, 0).unwrap();
        assert!(decoded == bytes && padding.iter().all(|&byte| byte == 0));
        stream.len()
    }

    #[test]
    fn what_does_not_shrink_fits() {
        let (mut compressor, mut state) = (Compressor::default(), 1u64);
        for size in [512, 1024, 1 << 15, 1 << 16, 1 << 17, 1 << 20] {
            let noise: Vec<u8> = (0..size)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    state.to_le_bytes()[7]
                })
                .collect();
            let longest = stream(&mut compressor, &noise);
            assert!(longest >= size, "{size}: {longest}");
            let small = stream(&mut Compressor::new(true), &noise);
            assert!(small >= size, "{size}: {small}");
            // Half of it, which shrinks.
            let half: Vec<u8> = noise.iter().map(|byte| byte & 15).collect();
            let again = stream(&mut Compressor::default(), &half);
            assert_eq!(stream(&mut compressor, &half), again, "the same bytes, after others");
            assert!(again < size * 3 / 4, "{size}: {again}");
            assert!(stream(&mut compressor, &vec![0; size]) < 24 + size / 64);
        }
    }

    #[test]
    fn a_grain_has_its_length() {
        let stored = Compressor::default().stored(0, &[7; 512]).unwrap();
        let mut grain = [0xff; 1024];
        let error = Decompressor::default().decode(&stored[12..], &mut grain, 1024).unwrap_err();
        assert_eq!(error, GrainError::Length { count: 512, wanted: 1024 });
        assert_eq!(FormatError::from(error).text, "a compressed grain decodes to 512 bytes, not 1024");
        Decompressor::default().decode(&stored[12..], &mut grain, 512).unwrap();
        assert!(grain[..512] == [7; 512] && grain[512..] == [0; 512], "the rest of the last grain");
        assert!(Decompressor::default().decode(&stored[13..], &mut grain, 512).is_err());
        assert!(Decompressor::default().decode(&stored[12..], &mut grain[..256], 512).is_err(), "more than a grain");
    }
}
