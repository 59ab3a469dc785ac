//! VHDX images in memory, for tests: made, read and checked from the bytes, without the code that is tested.
//!
//! Tests hand in images that they have built themselves. What makes no sense here panics, and so fails the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic here is a test that fails")]
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small: every number in them fits")]

mod bytes;
mod chains;
mod kit;
mod layout;
mod log;
mod salvage;
mod spec;
mod view;

pub use bytes::{crc32c, le16, le32, le64, put16, put32, put64, seal};
pub use instar_testkit::crashes;
pub use kit::Kit;
pub use log::{entry, pages, replayed, Change};
pub use spec::{build, fill, guid_text, Kind, Linkage, Log, Spec, BAT, METADATA};
pub use view::View;

use instar_guest_sdk::abi::DeviceConfig;

/// Bytes to which everything is aligned.
pub const MIB: usize = 1 << 20;

/// What the host would tell the guest of an image.
pub fn device(number: u32, bytes: &[u8], max_length: u64) -> DeviceConfig {
    let view = View::new(bytes);
    DeviceConfig {
        device: number,
        file_length: bytes.len() as u64,
        max_length,
        virtual_size: view.size as u64,
        cluster_size: view.block as u64,
        ..DeviceConfig::default()
    }
}
