//! Descriptors of compressed clusters ("Compressed Clusters Descriptor"), and the streams they lead to.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_qcow2_format::{decompress, ClusterSize, CompressedRange, CompressionType, HostCluster, HostOffset};
use proptest::prelude::*;

fn size(bits: u32) -> ClusterSize {
    ClusterSize::from_bits(bits).unwrap()
}

#[test]
fn the_fields_of_every_cluster_size() {
    for bits in 9..=21 {
        let x = 62 - (bits - 8);
        // All sectors, and an offset that begins within one.
        let most = (1u64 << (bits - 8)) - 1;
        let range = CompressedRange::decode(most << x | 0x1_2345, size(bits));
        assert_eq!((range.offset, range.end()), (HostOffset(0x1_2345), 0x1_2200 + (most + 1) * 512));
        assert_eq!(range.last_sector(), HostOffset(range.end() - 512).max(range.offset));
        // The largest offset, and no further sector; bits 62 and 63 are not part of it.
        let offset = (1 << x) - 1;
        let range = CompressedRange::decode(3 << 62 | offset, size(bits));
        assert_eq!((range.offset, range.length), (HostOffset(offset), 1));
        assert_eq!(range.last_sector(), range.offset);
    }
}

#[test]
fn clusters_that_a_stream_touches() {
    let touched = |descriptor, bits| -> Vec<u64> {
        CompressedRange::decode(descriptor, size(bits)).host_clusters(size(bits)).map(|HostCluster(c)| c).collect()
    };
    assert_eq!(touched(0x5_0000, 16), [5]);
    assert_eq!(touched(0x5_fe00, 16), [5]);
    assert_eq!(touched(1 << 54 | 0x5_fe00, 16), [5, 6]);
    assert_eq!(touched(1 << 61 | 1023, 9), [1, 2]);
}

#[test]
fn streams_that_are_cut_off_or_too_long() {
    let bytes: Vec<u8> = (0..4096u32).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
    let stream = miniz_oxide::deflate::compress_to_vec(&bytes, 6);
    let mut output = vec![0; 4096];
    // What follows the stream in its last sector does not matter.
    for padding in [0, 1, 511] {
        let padded = [&stream[..], &vec![0xa5; padding]].concat();
        decompress(CompressionType::Zlib, &padded, &mut output).unwrap();
        assert_eq!(output, bytes);
    }
    assert!(decompress(CompressionType::Zlib, &stream[..stream.len() / 2], &mut output).is_err());
    assert!(decompress(CompressionType::Zlib, &stream, &mut vec![0; 4097]).is_err());
    assert!(decompress(CompressionType::Zstd, &stream, &mut output).is_err());
    assert!(decompress(CompressionType::Zlib, &[], &mut output).is_err());
}

proptest! {
    #[test]
    fn whatever_a_descriptor_says_it_is_a_range(descriptor: u64, bits in 9u32..=21) {
        let range = CompressedRange::decode(descriptor, size(bits));
        prop_assert!(range.length > 0 && range.end().is_multiple_of(512));
        prop_assert!(range.offset <= range.last_sector() && range.last_sector().0 < range.end());
        prop_assert!(range.host_clusters(size(bits)).count() <= 3);
    }

    #[test]
    fn whatever_the_bytes_are_nothing_panics(bytes: Vec<u8>, zstd: bool) {
        let kind = if zstd { CompressionType::Zstd } else { CompressionType::Zlib };
        let _ = decompress(kind, &bytes, &mut [0; 512]);
    }
}
