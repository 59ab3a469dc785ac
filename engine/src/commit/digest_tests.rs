#![allow(clippy::unwrap_used)]

use super::*;
use crate::devices::Device;
use crate::sandbox::VolatileSlice;
use std::os::unix::fs::FileExt;

const OVERLAY: u32 = 0;
const SIZE: u64 = 3 << 20;

/// All buffers hold the same.
struct Sevens;

impl BufferAccess for Sevens {
    fn heap_slice(&self, _: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let memory = vec![7_u8; usize::try_from(length).ok()?].leak();
        Some(VolatileSlice::from(memory))
    }
}

/// A file of sevens with a hole in the middle, once read and once written.
fn devices() -> Devices {
    let mut devices = Devices::new();
    for (number, role) in [(OVERLAY, DeviceRole::Read), (DEVICE_OUTPUT, DeviceRole::Target)] {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
        file.write_all_at(&vec![7; 1 << 20], 2 << 20).unwrap();
        devices.attach(number, Device::new(file, true, SIZE, SIZE, false).with_role(role));
    }
    devices
}

fn digests() -> Digests {
    Digests { target: vec![DEVICE_OUTPUT], length: SIZE, ..Digests::default() }
}

fn expected() -> String {
    let disk: Vec<u8> = (0..SIZE).map(|at| if (1 << 20..2 << 20).contains(&at) { 0 } else { 7 }).collect();
    Sha256::digest(disk).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The whole disk, from one of the devices.
fn whole(device: u32) -> Vec<Request> {
    vec![Request::copy(device, 0, HASHED, 0, SIZE)]
}

#[test]
fn the_same_bytes_have_the_same_digest_wherever_they_are() {
    let (mut digests, mut devices) = (digests(), devices());
    digests.begin(&devices, false).unwrap();
    let mut pieces = [
        Request::copy(OVERLAY, 0, HASHED, 0, 1000),
        Request::write(HASHED, 1000, 4096, (1 << 20) - 1000),
        Request::zero(HASHED, 1 << 20, 1 << 20),
        // What lies past the end of a file is zero.
        Request::copy(OVERLAY, 2 << 20, HASHED, 2 << 20, 1 << 20),
    ];
    digests.take(&mut devices, &Sevens, &mut pieces).unwrap();
    assert!(pieces.iter().all(|request| request.status == request_status::OK));
    assert_eq!(digests.found().unwrap().before, expected());
    assert!(digests.check_before().is_ok() && digests.check_after().is_err());
    devices.enter(Phase::Target).unwrap();
    digests.begin(&devices, true).unwrap();
    digests.take(&mut devices, &Sevens, &mut whole(DEVICE_OUTPUT)).unwrap();
    assert!(digests.check_after().is_ok());
    assert_eq!(digests.found().unwrap().after, Some(expected()));
    assert!(digests.error(&DevicePaths::default(), None).is_none());
}

#[test]
fn one_byte_that_differs_is_found() {
    for at in [0, 1 << 20, SIZE - 1] {
        let (mut digests, mut devices) = (digests(), devices());
        digests.begin(&devices, false).unwrap();
        digests.take(&mut devices, &Sevens, &mut whole(OVERLAY)).unwrap();
        devices.enter(Phase::Target).unwrap();
        devices.device(DEVICE_OUTPUT).unwrap().file().write_all_at(&[8], at).unwrap();
        digests.begin(&devices, true).unwrap();
        assert!(digests.take(&mut devices, &Sevens, &mut whole(DEVICE_OUTPUT)).is_err());
        assert!(digests.check_after().is_err());
        let error = digests.error(&DevicePaths::default(), None).unwrap().to_string();
        assert!(error.contains(&expected()) && error.contains("the overlay still holds everything"), "{error}");
    }
}

#[test]
fn what_a_guest_may_not_say() {
    let lies = [
        // A gap, more than the disk, nothing, and numbers that overflow.
        Request::zero(HASHED, 1, 1),
        Request::zero(HASHED, 0, SIZE + 1),
        Request::zero(HASHED, 0, 0),
        Request::zero(HASHED, 0, u64::MAX),
        Request::copy(OVERLAY, u64::MAX, HASHED, 0, 2),
        // From what does not exist, and what is no writing.
        Request::copy(77, 0, HASHED, 0, 1),
        Request::read(HASHED, 0, 0, 1),
        Request::flush(HASHED),
        // Another device in between.
        Request::zero(DEVICE_OUTPUT, 0, 1),
    ];
    for lie in lies {
        let (mut digests, mut devices) = (digests(), devices());
        digests.begin(&devices, false).unwrap();
        assert!(digests.take(&mut devices, &Sevens, &mut [lie]).is_err(), "{lie:?}");
        assert!(digests.check_before().is_err());
    }
    let mut devices = devices();
    assert!(digests().take(&mut devices, &Sevens, &mut whole(OVERLAY)).is_err(), "before it was said");
    assert!(digests().begin(&devices, true).is_err(), "the end before the beginning");
    let mut twice = digests();
    twice.begin(&devices, false).unwrap();
    assert!(twice.begin(&devices, false).is_err());
    devices.enter(Phase::Target).unwrap();
    assert!(digests().begin(&devices, false).is_err(), "too late");
}

#[test]
fn a_disk_of_no_bytes_has_a_digest() {
    let (mut digests, devices) = (Digests::default(), devices());
    digests.begin(&devices, false).unwrap();
    assert!(digests.found().unwrap().before.starts_with("e3b0c44298fc1c14"));
}
