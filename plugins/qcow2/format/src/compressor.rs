//! Compressing clusters: the counterpart of [`Decompressor`](crate::Decompressor).
//!
//! Each cluster is a stream of its own, and the same bytes always give the same stream. The levels are those that QEMU uses:
//! the default ones of zlib and of Zstandard. QEMU looks for repetitions among the last 4 KiB only, and this among the last
//! 32 KiB, as deflate (RFC 1951) allows: QEMU decodes a cluster in one call, for which its zlib needs no window at all.

use crate::CompressionType;
use alloc::boxed::Box;
use alloc::vec;
use core::fmt;
use miniz_oxide::deflate::core::{compress, CompressorOxide, TDEFLFlush, TDEFLStatus};
use miniz_oxide::DataFormat;
use zstd_safe::CCtx;

/// The default level of zlib.
const DEFLATE_LEVEL: u8 = 6;
/// The default level of Zstandard.
const ZSTD_LEVEL: i32 = 3;

/// An encoder with its memory, which is used again for every cluster.
pub struct Compressor(Kind);

enum Kind {
    Zlib(Box<CompressorOxide>),
    Zstd(Option<CCtx<'static>>),
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Zlib(_) => "Compressor(zlib)",
            Kind::Zstd(_) => "Compressor(zstd)",
        })
    }
}

impl Compressor {
    /// An encoder for the clusters of an image with this `compression_type`.
    #[must_use]
    pub fn new(kind: CompressionType) -> Self {
        Self(match kind {
            CompressionType::Zlib => Kind::Zlib(Box::default()),
            CompressionType::Zstd => Kind::Zstd(CCtx::try_create()),
        })
    }

    /// The same, with all the memory that clusters of `size` bytes take; `None` if there is not so much.
    #[must_use]
    pub fn with_memory(kind: CompressionType, size: usize) -> Option<Self> {
        let mut encoder = Self::new(kind);
        if kind == CompressionType::Zstd {
            // The library takes its memory with the first cluster.
            encoder.compress(&vec![0; size], &mut [0; 512])?;
        }
        Some(encoder)
    }

    /// Bytes of memory that one takes for clusters of `size` bytes, at most.
    #[must_use]
    pub const fn memory(size: usize) -> usize {
        (1 << 20) + 2 * size
    }

    /// Compress a cluster into the first bytes of `stream`, and return how many these are. `None` if the stream would not fit:
    /// with one byte less than a cluster, that says that the cluster does not shrink. The content of `stream` is arbitrary then.
    pub fn compress(&mut self, cluster: &[u8], stream: &mut [u8]) -> Option<usize> {
        match &mut self.0 {
            Kind::Zlib(encoder) => {
                encoder.reset();
                // Without the header and checksum of zlib (RFC 1950), as the specification has it.
                encoder.set_format_and_level(DataFormat::Raw, DEFLATE_LEVEL);
                let (status, _, length) = compress(encoder, cluster, stream, TDEFLFlush::Finish);
                (status == TDEFLStatus::Done).then_some(length)
            }
            // Without memory for the encoder, the cluster is stored as it is.
            Kind::Zstd(encoder) => encoder.as_mut()?.compress(stream, cluster, ZSTD_LEVEL).ok(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::decompress;
    use alloc::vec::Vec;

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn clusters_come_back() {
        for kind in [CompressionType::Zlib, CompressionType::Zstd] {
            let mut encoder = Compressor::new(kind);
            for bits in 9..=21 {
                let size = 1usize << bits;
                let half: Vec<u8> = noise(size).iter().map(|byte| byte & 15).collect();
                let mut tail = noise(size);
                tail[size / 4..].fill(0);
                for (name, cluster) in [("half", half), ("tail", tail), ("one byte", vec![7; size])] {
                    let mut stream = vec![0xff; size - 1];
                    let length = encoder.compress(&cluster, &mut stream).unwrap();
                    assert!(length < size * 3 / 4, "{name}, {size}: {length}");
                    let mut decoded = vec![0xee; size];
                    decompress(kind, &stream[..length], &mut decoded).unwrap();
                    assert!(decoded == cluster, "{name}, {size}");
                    // What follows in the last sector is none of its business.
                    decompress(kind, &stream, &mut decoded).unwrap();
                    assert!(decoded == cluster, "{name}, {size}");
                    let mut again = vec![0; size - 1];
                    let other = Compressor::new(kind).compress(&cluster, &mut again).unwrap();
                    assert!(stream[..length] == again[..other], "the same bytes, after others");
                }
                assert_eq!(encoder.compress(&noise(size), &mut vec![0; size - 1]), None, "{size}");
            }
        }
    }
}
