//! Parallels images in memory, for tests: made, read and checked from the bytes, without the code that is tested.
//!
//! Tests hand in images that they have built themselves. What makes no sense here panics, and so fails the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic here is a test that fails")]
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small: every number in them fits")]

mod chains;
mod kit;
mod layout;
mod salvage;
mod spec;
mod view;

pub use instar_testkit::crashes;
pub use kit::Kit;
pub use spec::{assemble, build, extension, fill, section, Spec, Variant, CLUSTER};
pub use view::View;

use instar_guest_sdk::abi::DeviceConfig;

/// `in_use` of an image that is open for writing.
pub const OPEN: u32 = 0x746f_6e59;
/// `in_use` of an image that was closed.
pub const CLOSED: u32 = 0x312e_3276;

/// Write a little-endian number of 32 bits at byte `at`.
pub fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The little-endian number of 32 bits at byte `at`; zeroes past the end.
pub fn le32(bytes: &[u8], at: usize) -> u32 {
    (at..at + 4).rev().fold(0, |value, at| value << 8 | u32::from(bytes.get(at).copied().unwrap_or(0)))
}

/// The little-endian number of 64 bits at byte `at`; zeroes past the end.
pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

/// Sectors of the disk.
pub fn sectors(bytes: &[u8]) -> u64 {
    if bytes.starts_with(Variant::Sectors.magic()) {
        le32(bytes, 36).into()
    } else {
        le64(bytes, 36)
    }
}

/// What the host would tell the guest of an image.
pub fn device(number: u32, bytes: &[u8], max_length: u64) -> DeviceConfig {
    let cluster = u64::from(le32(bytes, 28)) * 512;
    DeviceConfig {
        device: number,
        file_length: bytes.len() as u64,
        max_length,
        virtual_size: sectors(bytes).wrapping_mul(512),
        cluster_size: 1 << cluster.trailing_zeros().min(63),
        ..DeviceConfig::default()
    }
}
