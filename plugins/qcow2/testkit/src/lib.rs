//! qcow2 images in memory, for tests: a builder, a reader and a checker that share no code with the driver, and the commits
//! of pairs of such images.
//!
//! Tests hand in images that they have built themselves. What makes no sense here panics, and so fails the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic here is a test that fails")]
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small: every number in them fits")]

pub mod bitmaps;
pub mod builder;
pub mod checker;
pub mod damage;
pub mod header;
pub mod pair;

mod chains;
mod kit;
mod layout;
mod salvage;
mod view;

pub use instar_testkit::{ANCESTOR, OVERLAY};
pub use kit::Kit;

use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{FormatDriver, ReadBelow, Source};
use instar_guest_view::Ancestors;
use instar_qcow2_driver::Qcow2;

/// The big-endian number of 32 bits at byte `at`. Panics past the end.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The big-endian number of 64 bits at byte `at`. Panics past the end.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What the host would tell the guest of an image.
pub fn config(io: &MemoryDevices, device: u32) -> DeviceConfig {
    let file = &io.files[&device];
    DeviceConfig {
        flags: device_flags::PRESENT | device_flags::WRITABLE,
        device,
        module: 2,
        file_length: file.len() as u64,
        max_length: i64::MAX as u64,
        virtual_size: be64(file, 24),
        cluster_size: 1 << be32(file, 20),
        ..DeviceConfig::default()
    }
}

/// Commit device 0 into the output device; device 1, if it is there, is the backing's backing.
///
/// # Errors
/// What the drivers or the commit refuse, or fail at.
pub fn run_commit(io: &mut MemoryDevices, options: Options) -> Result<Outcome, CommitFailure> {
    run_commit_into(io, options, 0)
}

/// [`run_commit`]; the device of the backing has these [`device_flags`] besides.
///
/// # Errors
/// As [`run_commit`].
pub fn run_commit_into(io: &mut MemoryDevices, options: Options, flags: u32) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: instar_guest_commit::Step::Check, error };
    let (overlay, mut backing) = (config(io, OVERLAY), config(io, DEVICE_OUTPUT));
    backing.flags |= flags;
    if flags & device_flags::FIXED_LENGTH != 0 {
        backing.max_length = backing.file_length;
    }
    let has_ancestor = io.files.contains_key(&ANCESTOR);
    io.hold_commit(&overlay, options.keep_overlay, &backing);
    let mut source = Qcow2::open_source(io, &overlay).map_err(at)?;
    let mut sink = Qcow2::open_sink(io, &backing, has_ancestor).map_err(at)?;
    let mut layers: Vec<Box<dyn Source>> = Vec::new();
    if has_ancestor {
        let ancestor = config(io, ANCESTOR);
        layers.push(Box::new(Qcow2::open_source(io, &ancestor).map_err(at)?));
    }
    let mut below = Ancestors::new(layers);
    assert_eq!(below.exists(), has_ancestor);
    let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
    commit(io, &mut images, options, &mut |_| {})
}
