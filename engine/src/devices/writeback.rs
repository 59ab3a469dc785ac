//! Letting the disk work while the processor does: what was written is on its way before the flush waits for it.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Less than this, in bytes, is not worth a call, and is written better by the kernel, sorted, with what is near it.
const LEAST: u64 = 1 << 20;

/// Have the kernel begin to write a range of the page cache to the disk, without waiting for it. A hint: it promises nothing
/// about durability, and nothing depends on it. An error of the disk stays with the file until the next flush reports it.
pub fn begin(file: &File, offset: u64, length: u64) {
    let (Ok(start), Ok(count)) = (i64::try_from(offset), i64::try_from(length)) else { return };
    if length < LEAST {
        return;
    }
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call touches no memory of this process.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), start, count, libc::SYNC_FILE_RANGE_WRITE) };
}
