//! Compressed clusters: where they are ("Compressed Clusters Descriptor"), and how they are decoded.
//!
//! Decoding never writes past the output, takes memory in proportion to the output only, and returns an error for
//! whatever is not a stream of the cluster's size.

use crate::types::{ClusterSize, HostCluster, HostOffset};
use crate::CompressionType;
use core::fmt;
use zlib_rs::{Inflate, InflateFlush};
use zstd_safe::{find_frame_compressed_size, DCtx};

/// The unit of a descriptor's length, in bytes, whatever the cluster size.
const SECTOR: u64 = 512;
/// Any window that deflate has: 32 KiB.
const WINDOW_BITS: u8 = 15;

/// Where the stream of a compressed cluster stands in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedRange {
    /// First byte; rarely the start of a cluster or sector.
    pub offset: HostOffset,
    /// Length in bytes, up to the end of its last 512-byte sector. The stream may end earlier, and the file may end
    /// within the last sector.
    pub length: u64,
}

impl CompressedRange {
    /// Decode a descriptor: bits 0 to 61 of an L2 entry. With x = 62 - (`cluster_bits` - 8), the bits below x are the
    /// offset, and the others the number of sectors after the one in which the stream begins.
    #[must_use]
    pub const fn decode(descriptor: u64, size: ClusterSize) -> Self {
        let x = 62 - (size.bits() - 8);
        let offset = descriptor & ((1 << x) - 1);
        let additional = (descriptor & ((1 << 62) - 1)) >> x;
        Self { offset: HostOffset(offset), length: (additional + 1) * SECTOR - offset % SECTOR }
    }

    /// The descriptor of a stream of `length` bytes, 1 at least, from `offset` on; `None` where it has no room for the offset
    /// (from 512 TiB on with clusters of 2 MiB) or the length.
    #[must_use]
    pub const fn encode(offset: HostOffset, length: u64, size: ClusterSize) -> Option<u64> {
        let x = 62 - (size.bits() - 8);
        let Some(end) = offset.0.checked_add(length) else { return None };
        if length == 0 || offset.0 >> x != 0 {
            return None;
        }
        let additional = (end - 1) / SECTOR - offset.0 / SECTOR;
        if additional >> (size.bits() - 8) != 0 {
            return None;
        }
        Some(additional << x | offset.0)
    }

    /// The first byte after the range; at most 2^61 and 4 MiB.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset.0 + self.length
    }

    /// Where the last sector of the range begins, or the range itself, if that is later. A file that holds all of the
    /// stream is longer than this.
    #[must_use]
    pub const fn last_sector(self) -> HostOffset {
        let sector = self.end() - SECTOR;
        HostOffset(if sector > self.offset.0 { sector } else { self.offset.0 })
    }

    /// The host clusters that the range touches, ascending. Other compressed clusters may touch them, too.
    pub fn host_clusters(self, size: ClusterSize) -> impl Iterator<Item = HostCluster> {
        let first = size.host_cluster(self.offset).0;
        let last = size.host_cluster(HostOffset(self.end() - 1)).0;
        (first..=last).map(HostCluster)
    }
}

/// Why the stream of a compressed cluster does not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// It is not a stream of this kind.
    Invalid,
    /// It ends before the cluster is full.
    Short,
    /// It holds more than the cluster.
    Long,
    /// There is no memory for the decoder.
    Memory,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Invalid => "does not decode",
            Self::Short => "decodes to less than a cluster",
            Self::Long => "decodes to more than a cluster",
            Self::Memory => "cannot be decoded: no memory is left",
        })
    }
}

/// A decoder with its memory, which is used again for every cluster.
pub struct Decompressor(Kind);

enum Kind {
    Zlib(Inflate),
    Zstd(Option<DCtx<'static>>),
}

impl Decompressor {
    /// A decoder for the clusters of an image with this `compression_type`.
    #[must_use]
    pub fn new(kind: CompressionType) -> Self {
        Self(match kind {
            CompressionType::Zlib => Kind::Zlib(Inflate::new(false, WINDOW_BITS)),
            CompressionType::Zstd => Kind::Zstd(DCtx::try_create()),
        })
    }

    /// Whether there was memory for it.
    #[must_use]
    pub const fn has_memory(&self) -> bool {
        !matches!(self.0, Kind::Zstd(None))
    }

    /// Decode the stream at the start of `input` into `output`, which is a cluster long. What follows the stream is
    /// ignored.
    ///
    /// # Errors
    /// [`DecodeError`]; then the content of `output` is arbitrary.
    pub fn decompress(&mut self, input: &[u8], output: &mut [u8]) -> Result<(), DecodeError> {
        match &mut self.0 {
            Kind::Zlib(state) => inflate(state, input, output),
            Kind::Zstd(Some(decoder)) => decode_frames(decoder, input, output),
            Kind::Zstd(None) => Err(DecodeError::Memory),
        }
    }
}

/// Decode one cluster with a decoder of its own: see [`Decompressor::decompress`].
///
/// # Errors
/// [`DecodeError`].
pub fn decompress(kind: CompressionType, input: &[u8], output: &mut [u8]) -> Result<(), DecodeError> {
    Decompressor::new(kind).decompress(input, output)
}

/// Raw deflate. As in QEMU the cluster is good as soon as it is full, even if the stream would go on, or is used up without the
/// mark of its end.
fn inflate(state: &mut Inflate, input: &[u8], output: &mut [u8]) -> Result<(), DecodeError> {
    state.reset(false);
    state.decompress(input, output, InflateFlush::Finish).map_err(|_| DecodeError::Invalid)?;
    if state.total_out() == output.len() as u64 {
        Ok(())
    } else {
        Err(DecodeError::Short)
    }
}

/// Zstandard frames, until the output is full. The last one must end there.
///
/// A frame is decoded in one go, straight into the output, so that its window takes no memory of its own: encoders write
/// one of 8 MiB for the smallest cluster.
fn decode_frames(decoder: &mut DCtx<'_>, input: &[u8], output: &mut [u8]) -> Result<(), DecodeError> {
    let (mut input, mut output) = (input, output);
    while !output.is_empty() {
        if input.is_empty() {
            return Err(DecodeError::Short);
        }
        let length = find_frame_compressed_size(input).map_err(|_| DecodeError::Invalid)?;
        // A frame takes room in the input, or this would never end.
        let (frame, rest) = input.split_at_checked(length).filter(|_| length > 0).ok_or(DecodeError::Invalid)?;
        let written = decoder.decompress(output, frame).map_err(error)?;
        (input, output) = (rest, output.get_mut(written..).ok_or(DecodeError::Invalid)?);
    }
    Ok(())
}

/// What the library's error means here. It is the negative of a number of `zstd_errors.h`.
fn error(code: usize) -> DecodeError {
    /// `ZSTD_error_dstSize_tooSmall`.
    const TOO_SMALL: usize = 70;
    if code == TOO_SMALL.wrapping_neg() {
        DecodeError::Long
    } else {
        DecodeError::Invalid
    }
}

#[cfg(test)]
#[path = "compressed_tests.rs"]
mod tests;
