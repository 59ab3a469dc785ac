//! Images of qcow version 1 in memory, for tests: made, read and checked from the bytes, without the code that is tested.
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
pub use spec::{build, fill, Spec, State, CLUSTER};
pub use view::View;

use instar_guest_sdk::abi::DeviceConfig;

/// Write a big-endian number of 64 bits at byte `at`.
pub fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// The big-endian number of 64 bits at byte `at`; zeroes past the end.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    (at..at + 8).fold(0, |value, at| value << 8 | u64::from(bytes.get(at).copied().unwrap_or(0)))
}

/// What the host would tell the guest of an image.
pub fn device(number: u32, bytes: &[u8], max_length: u64) -> DeviceConfig {
    let size = be64(bytes, 24);
    DeviceConfig {
        device: number,
        file_length: bytes.len() as u64,
        max_length,
        virtual_size: size - size % 512,
        cluster_size: 1 << bytes[32],
        ..DeviceConfig::default()
    }
}
