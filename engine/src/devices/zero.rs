//! Making a range read as zero, and giving its space back.

use super::retry;
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of zeroes that are written at once where the file system can do no better.
const BUFFER: u64 = 1 << 20;

/// Errors of `fallocate` that mean "not on this file system" (fallocate(2)).
pub fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV))
}

/// Turn `length` bytes at `offset`, within the file, into a hole, or at least into zeroes.
pub fn zero_within(file: &File, offset: u64, length: u64) -> io::Result<()> {
    zero(file, offset, length, false)
}

/// Make `length` bytes at `offset`, within the file, read as zero. With `discard`, only give back their space.
pub fn zero(file: &File, offset: u64, length: u64, discard: bool) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let fallocate = |flags| retry(|| rustix::fs::fallocate(file, flags | FallocateFlags::KEEP_SIZE, offset, length));
    match fallocate(FallocateFlags::PUNCH_HOLE) {
        Ok(()) => return Ok(()),
        // What a discarded range reads as does not matter, and neither does space that is not given back.
        Err(_) if discard => return Ok(()),
        Err(error) if is_refusal(&error) => {}
        Err(error) => return Err(error),
    }
    match fallocate(FallocateFlags::ZERO_RANGE) {
        Ok(()) => return Ok(()),
        Err(error) if is_refusal(&error) => {}
        Err(error) => return Err(error),
    }
    let zeroes = vec![0; usize::try_from(length.min(BUFFER)).unwrap_or(0)];
    let mut done = 0;
    while done < length {
        let piece = usize::try_from((length - done).min(BUFFER)).unwrap_or(0);
        file.write_all_at(&zeroes[..piece], offset + done)?;
        done += piece as u64;
    }
    Ok(())
}
