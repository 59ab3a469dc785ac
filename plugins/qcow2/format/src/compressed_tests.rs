#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::L2Entry;
use crate::Version;
use alloc::vec;
use alloc::vec::Vec;
use miniz_oxide::deflate::compress_to_vec;
use proptest::prelude::*;

const BOTH: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];

fn size(bits: u32) -> ClusterSize {
    ClusterSize::from_bits(bits).unwrap()
}

/// The first half noise, the second half a pattern.
fn sample(length: usize) -> Vec<u8> {
    let mut random = 12345u32;
    (0..length)
        .map(|i| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if i < length / 2 {
                random.to_be_bytes()[0]
            } else {
                (i / 64 % 251) as u8
            }
        })
        .collect()
}

fn encode(kind: CompressionType, data: &[u8]) -> Vec<u8> {
    match kind {
        CompressionType::Zlib => compress_to_vec(data, 6),
        CompressionType::Zstd => {
            let mut stream = vec![0; zstd_safe::compress_bound(data.len())];
            let length = zstd_safe::compress(&mut stream[..], data, 3).unwrap();
            stream.truncate(length);
            stream
        }
    }
}

/// A frame with a window of 2^`exponent` bytes and one RLE block.
fn rle_frame(exponent: u8, count: u32) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (exponent - 10) << 3];
    frame.extend_from_slice(&(count << 3 | 1 << 1 | 1).to_le_bytes()[..3]);
    frame.push(0xaa);
    frame
}

#[test]
fn descriptors_of_every_cluster_size() {
    for bits in ClusterSize::MIN_BITS..=ClusterSize::MAX_BITS {
        let x = 62 - (bits - 8);
        let offset = (5 << bits) + 700;
        // One sector: it ends where the sector ends.
        let range = CompressedRange::decode(offset, size(bits));
        assert_eq!(range, CompressedRange { offset: HostOffset(offset), length: 512 - offset % 512 });
        assert_eq!(range.last_sector(), range.offset);
        // As many sectors as the field can say, on the last byte of a sector.
        let offset = (7 << bits) - 1;
        let all = (1u64 << (bits - 8)) - 1;
        let range = CompressedRange::decode(all << x | offset, size(bits));
        assert_eq!((range.offset.0, range.length), (offset, all * 512 + 1));
        assert_eq!(range.end(), (7 << bits) + all * 512);
        let clusters: Vec<u64> = range.host_clusters(size(bits)).map(|c| c.0).collect();
        assert_eq!(clusters.first(), Some(&6));
        assert_eq!(clusters.last(), Some(&(6 + (all * 512).div_ceil(1 << bits))));
        // All bits set: nothing overflows.
        let range = CompressedRange::decode(u64::MAX, size(bits));
        assert_eq!(range.end() % 512, 0);
        assert!(range.host_clusters(size(bits)).count() <= 4);
    }
}

#[test]
fn an_entry_keeps_its_descriptor_and_must_not_be_flagged() {
    let entry = L2Entry::decode(1 << 62 | 0x1234, size(16), Version::V3).unwrap();
    assert_eq!(entry, L2Entry::Compressed { descriptor: 0x1234 });
    assert!(L2Entry::decode(3 << 62 | 0x1234, size(16), Version::V3).is_err());
}

#[test]
fn clusters_of_every_size_decode_with_trailing_padding() {
    for kind in BOTH {
        let mut decoder = Decompressor::new(kind);
        for bits in ClusterSize::MIN_BITS..=ClusterSize::MAX_BITS {
            let data = sample(1 << bits);
            let mut stream = encode(kind, &data);
            stream.extend_from_slice(&[0xff; 511]);
            let mut output = vec![0; data.len()];
            decoder.decompress(&stream, &mut output).unwrap();
            assert!(output == data, "{kind:?} {bits}");
            assert_eq!(decompress(kind, &stream, &mut output), Ok(()));
        }
    }
}

#[test]
fn streams_of_another_length_are_errors() {
    for kind in BOTH {
        let stream = encode(kind, &sample(2048));
        assert_eq!(decompress(kind, &stream, &mut [0; 4096]), Err(DecodeError::Short));
        for cut in 0..stream.len() / 2 {
            assert!(decompress(kind, &stream[..cut], &mut [0; 2048]).is_err());
        }
    }
    // QEMU takes deflate streams that would go on, and no such zstd frames.
    assert_eq!(
        decompress(CompressionType::Zlib, &encode(CompressionType::Zlib, &sample(4096)), &mut [0; 2048]),
        Ok(())
    );
    let long = encode(CompressionType::Zstd, &sample(4096));
    assert!(decompress(CompressionType::Zstd, &long, &mut [0; 2048]).is_err());
}

#[test]
fn zstd_windows_take_no_memory_and_bombs_are_stopped() {
    for exponent in [10, 16, 23, 31] {
        let mut output = vec![0; 1024];
        assert_eq!(decompress(CompressionType::Zstd, &rle_frame(exponent, 1024), &mut output), Ok(()));
        assert!(output.iter().all(|&byte| byte == 0xaa));
        assert!(decompress(CompressionType::Zstd, &rle_frame(exponent, 1025), &mut output).is_err());
    }
    assert_eq!(decompress(CompressionType::Zstd, &rle_frame(41, 1024), &mut [0; 1024]), Err(DecodeError::Invalid));
    // Two frames, as QEMU's loop reads them.
    let two = [rle_frame(20, 512), rle_frame(20, 512)].concat();
    assert_eq!(decompress(CompressionType::Zstd, &two, &mut [0; 1024]), Ok(()));
    // 4 MiB of blocks of 64 KiB each.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 31 << 3];
    for _ in 0..1 << 20 {
        bomb.extend_from_slice(&((65536u32 << 3 | 1 << 1).to_le_bytes()[..3]));
        bomb.push(0);
    }
    let mut output = vec![0; 65536];
    assert!(decompress(CompressionType::Zstd, &bomb, &mut output).is_err());
    assert!(decompress(CompressionType::Zstd, &[0xff; 64], &mut output).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn mutated_streams_never_panic(
        zstd: bool,
        length in 1usize..6000,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        room in 1usize..8192,
    ) {
        let kind = BOTH[usize::from(zstd)];
        let mut stream = encode(kind, &sample(length));
        for (at, value) in changes {
            let at = at.index(stream.len());
            stream[at] = value;
        }
        let _ = decompress(kind, &stream, &mut vec![0; room]);
        let _ = decompress(kind, &stream, &mut vec![0; length]);
    }

    #[test]
    fn noise_never_panics(zstd: bool, magic: bool, mut stream in prop::collection::vec(any::<u8>(), 0..600)) {
        if magic && stream.len() >= 4 {
            stream[..4].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        }
        let _ = decompress(BOTH[usize::from(zstd)], &stream, &mut [0; 4096]);
    }
}

#[test]
fn a_descriptor_says_where_a_stream_is() {
    for bits in 9..=21 {
        let (size, bytes) = (size(bits), 1u64 << bits);
        let last = (1u64 << (62 - (bits - 8))) - 1;
        for offset in [0, 1, 511, 512, 65_537, last] {
            for length in [1, 2, 511, 512, 513, bytes - 1] {
                let Some(descriptor) = CompressedRange::encode(HostOffset(offset), length, size) else {
                    // Of clusters of 512 bytes, a stream may be in two sectors, and no more.
                    assert!(length >= 513, "{bits}: {offset}, {length}");
                    continue;
                };
                let range = CompressedRange::decode(descriptor, size);
                assert_eq!(range.offset, HostOffset(offset));
                // To the end of its last sector.
                assert_eq!(range.end(), (offset + length).next_multiple_of(512), "{bits}: {offset}, {length}");
                assert_eq!(
                    L2Entry::decode(L2Entry::Compressed { descriptor }.encode(), size, Version::V3).ok(),
                    Some(L2Entry::Compressed { descriptor })
                );
            }
        }
        for (offset, length) in [(last + 1, 1), (0, 0), (u64::MAX, 1), (0, 1 << 40)] {
            assert_eq!(CompressedRange::encode(HostOffset(offset), length, size), None);
        }
    }
}
