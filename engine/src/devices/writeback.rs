//! Early writeback: the disk begins to write before a flush waits for it.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Less than this, in bytes, is not worth a call, and is written better by the kernel, sorted, with what is near it.
const LEAST: u64 = 1 << 20;

/// Let the kernel begin to write a range of the page cache to the disk, without waiting. This is a hint that promises no
/// durability. The next flush reports an error of the disk.
pub fn begin(file: &File, offset: u64, length: u64) {
    let (Ok(start), Ok(count)) = (i64::try_from(offset), i64::try_from(length)) else { return };
    if length < LEAST {
        return;
    }
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call touches no memory of this process.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), start, count, libc::SYNC_FILE_RANGE_WRITE) };
}
