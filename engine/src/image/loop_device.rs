//! The file below a loop device, which is a second name for the same bytes.

use crate::confine::calls::LOOP_GET_STATUS64;
use crate::lookup::Identity;
use rustix::fs::{major, Stat};
use std::os::fd::{AsFd, AsRawFd};

/// The major number of loop devices (`LOOP_MAJOR` of `linux/major.h`).
const LOOP_MAJOR: u32 = 7;
/// 64-bit words of `struct loop_info64`, the first three of which are the device number of the file system and the inode of
/// the file below, and the number of the device, if one is below.
const WORDS: usize = 29;

/// Return the file below an open block device, if it is a loop device.
pub fn below(device: impl AsFd, stat: &Stat) -> Option<Identity> {
    if major(stat.st_rdev) != LOOP_MAJOR {
        return None;
    }
    let mut info = [0_u64; WORDS];
    // SAFETY: the request stores a `struct loop_info64`, which is as long as the array.
    let asked = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_GET_STATUS64.into(), info.as_mut_ptr()) };
    let [file_system, inode, number, ..] = info;
    match (asked, number) {
        (0, 0) => Some(Identity::of_file(file_system, inode)),
        (0, number) => Some(Identity::of_device(number)),
        // One that stands on nothing.
        _ => None,
    }
}
