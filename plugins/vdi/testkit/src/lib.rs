//! VDI images of 1 KiB blocks in memory, for tests: made, read and checked from the bytes, without the code that is tested,
//! and the commits of pairs of such images.
//!
//! Tests hand in images that they have built themselves. What makes no sense here panics, and so fails the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic here is a test that fails")]
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small: every number in them fits")]

pub mod pair;

mod chains;
mod kit;
mod layout;
mod salvage;
mod spec;
mod view;

pub use instar_testkit::crashes;
pub use kit::Kit;
pub use spec::{build, fill, identity, Spec, State, BLOCK};
pub use view::View;

use instar_guest_sdk::abi::DeviceConfig;

/// Where the map of an image that is built here begins.
const MAP: usize = 512;

/// Write a little-endian number of 32 bits at byte `at`.
pub fn put32(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}

/// The little-endian number of 32 bits at byte `at`. Panics past the end.
pub fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// The little-endian number of 64 bits at byte `at`. Panics past the end.
pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What the host would tell the guest of an image.
pub fn device(number: u32, bytes: &[u8], max_length: u64) -> DeviceConfig {
    DeviceConfig {
        device: number,
        file_length: bytes.len() as u64,
        max_length,
        virtual_size: le64(bytes, 368).next_multiple_of(512),
        cluster_size: le32(bytes, 376) as u64,
        ..DeviceConfig::default()
    }
}
