//! The devices in memory hold a driver to what the host holds it to.
#![cfg(feature = "memory")]
#![allow(missing_docs, clippy::unwrap_used)]

use instar_guest_sdk::abi::{
    device_flags, DeviceConfig, DeviceRole, FileDevice, FileList, Phase, Request, DEVICE_OUTPUT,
};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::BlockIo;
use std::panic::{catch_unwind, AssertUnwindSafe};

const OVERLAY: u32 = 0;
const BELOW: u32 = 1;
const CHILD: u32 = 2;
const OTHER: u32 = DEVICE_OUTPUT + 1;
static DATA: [u8; 512] = [7; 512];

fn write(device: u32, offset: u64) -> Request {
    Request::write(device, offset, DATA.as_ptr() as u64, 512)
}

/// Files of 8 KiB; the output, a block device, has another file that may grow to 9000 bytes.
fn devices(kept: bool) -> MemoryDevices {
    let numbers = [OVERLAY, BELOW, DEVICE_OUTPUT, OTHER];
    let mut io = MemoryDevices::new(numbers.map(|number| (number, vec![1; 8192])));
    let other = FileDevice { flags: device_flags::PRESENT, device: OTHER, file_length: 8192, max_length: 9000 };
    let overlay = DeviceConfig { file_length: 8192, max_length: 8192, ..DeviceConfig::default() };
    let output = DeviceConfig {
        device: DEVICE_OUTPUT,
        flags: device_flags::FIXED_LENGTH,
        files: FileList::of(Box::leak(Box::new([other]))),
        max_length: 1 << 20,
        ..overlay
    };
    io.hold_commit(&overlay, kept, &output);
    io
}

/// What ends the guest at the last of these requests; nothing has changed by it.
fn refused(io: &mut MemoryDevices, requests: &[Request]) -> String {
    let (last, first) = requests.split_last().unwrap();
    io.submit(&mut first.to_vec()).unwrap();
    let before = io.files.clone();
    let panic = catch_unwind(AssertUnwindSafe(|| io.submit(&mut [*last]))).unwrap_err();
    assert!(io.files == before);
    panic.downcast_ref::<String>().unwrap().clone()
}

fn assert_refused(io: &mut MemoryDevices, requests: &[Request], why: &str) {
    let text = refused(io, requests);
    assert!(text.contains(why), "{text} lacks {why}");
}

fn in_target(kept: bool) -> MemoryDevices {
    let mut io = devices(kept);
    io.enter(Phase::Target);
    io
}

#[test]
fn nothing_changes_before_the_first_phase() {
    for device in [OVERLAY, DEVICE_OUTPUT, OTHER] {
        assert_refused(&mut devices(false), &[write(device, 0)], "before a plan");
    }
    assert_refused(
        &mut MemoryDevices::new([(DEVICE_OUTPUT, vec![0; 512])]),
        &[write(DEVICE_OUTPUT, 0)],
        "before a plan",
    );
    assert_refused(&mut in_target(false), &[write(BELOW, 0)], "read-only");
}

#[test]
fn the_overlay_comes_after_the_target() {
    let record = [write(OVERLAY, 512), Request::flush(OVERLAY), write(OTHER, 0)];
    assert_refused(&mut in_target(false), &[&record[..], &[write(OVERLAY, 512)]].concat(), "no record of its parent");
    assert_refused(&mut in_target(false), &[write(OVERLAY, 0), write(OTHER, 0)], "before the record");
    assert_refused(&mut in_target(false), &[write(OVERLAY, 0), write(OVERLAY, 4096)], "no record");
    let mut io = in_target(false);
    io.submit(&mut [write(OTHER, 0)]).unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| io.clone().enter(Phase::Overlay))).is_err(), "not flushed");
    io.submit(&mut [Request::flush(OTHER)]).unwrap();
    io.enter(Phase::Overlay);
    io.submit(&mut [write(OVERLAY, 4096), Request::set_length(OVERLAY, 0)]).unwrap();
    assert_refused(&mut io, &[write(OTHER, 0)], "said to be complete");
    let mut kept = in_target(true);
    kept.enter(Phase::Overlay);
    assert_refused(&mut kept, &[write(OVERLAY, 0)], "stay as it is");
}

#[test]
fn another_parent_comes_last() {
    let child =
        DeviceConfig { device: CHILD, flags: 3, file_length: 8192, max_length: 9000, ..DeviceConfig::default() };
    let target =
        DeviceConfig { device: OTHER, flags: 3, file_length: 8192, max_length: 9000, ..DeviceConfig::default() };
    let mut io = MemoryDevices::default();
    io.hold([(DeviceRole::Child, &child), (DeviceRole::Target, &target)]);
    io.files.extend([CHILD, OTHER].map(|device| (device, vec![0; 8192])));
    assert_refused(&mut io, &[write(CHILD, 0)], "before a plan");
    io.enter(Phase::Target);
    assert_refused(&mut io, &[write(CHILD, 0)], "before that parent is complete");
    io.submit(&mut [write(OTHER, 0)]).unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| io.clone().enter(Phase::Children))).is_err(), "not flushed");
    io.submit(&mut [Request::flush(OTHER)]).unwrap();
    io.enter(Phase::Children);
    io.submit(&mut [write(CHILD, 4096), write(CHILD, 0)]).unwrap();
    assert_refused(&mut io, &[write(OTHER, 0)], "said to be complete");
    assert_refused(&mut io, &[write(CHILD, 8800)], "9000 bytes");
}

#[test]
fn files_have_bounds() {
    assert_refused(&mut in_target(false), &[Request::set_length(OTHER, 9000), write(OTHER, 8500)], "9000 bytes");
    assert_refused(&mut in_target(false), &[write(DEVICE_OUTPUT, 8192 - 100)], "8192 bytes");
    let mut io = in_target(false);
    io.submit(&mut [Request::set_length(DEVICE_OUTPUT, 100)]).unwrap();
    assert_eq!(io.files[&DEVICE_OUTPUT].len(), 8192, "a block device stays as long as it is");
}

#[test]
fn requests_make_sense() {
    let io = &mut in_target(false);
    assert_refused(io, &[Request::read(OVERLAY, u64::MAX, DATA.as_ptr() as u64, 512)], "overflows");
    assert_refused(io, &[Request::read(OVERLAY, 0, 0, 512)], "a buffer");
    assert_refused(io, &[Request::copy(OTHER, 0, OTHER, 100, 512)], "overlap");
    assert_refused(io, &[Request::copy(OTHER, u64::MAX - 5, DEVICE_OUTPUT, 0, 512)], "source range");
    assert_refused(io, &[Request { flags: 4, ..Request::zero(OTHER, 0, 1) }], "flags");
    assert_refused(io, &[Request { op: 99, ..Request::flush(OTHER) }], "does not exist");
}
