//! Where the blocks of a new image begin, up to the largest disk that is made.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_vdi_format::{data_offset_of, MAX_NEW_BLOCKS, NEW_BLOCK_BYTES};

const MIB: u64 = 1 << 20;

#[test]
fn blocks_begin_behind_the_header_and_a_map_of_whole_mebibytes() {
    for (size, blocks, data_offset) in [
        (1, 1, 2 * MIB),
        (NEW_BLOCK_BYTES, 1, 2 * MIB),
        (NEW_BLOCK_BYTES + 1, 2, 2 * MIB),
        // The last map that fits into a MiB, and the first that does not.
        ((1 << 18) * NEW_BLOCK_BYTES, 1 << 18, 2 * MIB),
        ((1 << 18) * NEW_BLOCK_BYTES + 1, (1 << 18) + 1, 3 * MIB),
        (MAX_NEW_BLOCKS * NEW_BLOCK_BYTES, 1 << 26, 257 * MIB),
    ] {
        assert_eq!(data_offset_of(size).unwrap(), (blocks, data_offset), "{size}");
    }
}

#[test]
fn disks_without_blocks_and_with_too_many_are_refused() {
    for size in [0, MAX_NEW_BLOCKS * NEW_BLOCK_BYTES + 1, u64::MAX] {
        let text = data_offset_of(size).unwrap_err().to_string();
        assert!(text.contains(&format!("a disk of {size} bytes cannot be made")), "{text}");
        assert!(text.contains("from 1 to 70368744177664"), "{text}");
    }
}
