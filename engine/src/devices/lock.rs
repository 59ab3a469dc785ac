//! Locks as QEMU takes them, so that an image in use by a virtual machine is noticed, and ours by QEMU.
//!
//! A read lock on byte 100 + n says "I use permission n", on byte 200 + n "I do not share permission n"; both are
//! open-file-description locks (QEMU, `block/file-posix.c`). A conflict is found by asking whether a write lock could
//! be had on the counterpart's byte.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

/// The bytes of a file that stand for permissions: nobody locks one for another reason.
pub const LOCKED: RangeInclusive<u64> = 100..=203;

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// Permissions, with QEMU's numbers and names.
const CONSISTENT_READ: (i64, &str) = (0, "consistent read");
const WRITE: (i64, &str) = (1, "write");
const RESIZE: (i64, &str) = (3, "resize");

/// Why a lock was not had, in QEMU's words.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process does not share a permission that is needed.
    #[error("Failed to get \"{0}\" lock")]
    Needed(&'static str),
    /// Another process uses a permission that cannot be shared.
    #[error("Failed to get shared \"{0}\" lock")]
    Shared(&'static str),
    /// The lock could not be taken or asked for.
    #[error("Failed to lock byte {0}: {1}")]
    Failed(i64, io::Error),
}

/// Lock an image that is changed: nobody else may change it.
///
/// # Errors
/// [`LockError`] when another process uses the image.
pub fn lock_read_write(file: &File) -> Result<(), LockError> {
    lock(file, &[CONSISTENT_READ, WRITE, RESIZE], &[WRITE, RESIZE])
}

/// Lock an image that is only read: nobody may change it meanwhile.
///
/// # Errors
/// [`LockError`] when another process changes the image.
pub fn lock_read_only(file: &File) -> Result<(), LockError> {
    lock(file, &[CONSISTENT_READ], &[WRITE, RESIZE])
}

/// Whether somebody else uses a file, in whatever way. A file system without such locks says no.
#[must_use]
pub fn is_locked(file: &File) -> bool {
    fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, USED, UNSHARED + RESIZE.0 + 1 - USED).unwrap_or(false)
}

fn lock(file: &File, used: &[(i64, &'static str)], unshared: &[(i64, &'static str)]) -> Result<(), LockError> {
    let result = try_lock(file, used, unshared);
    if result.is_err() {
        // Who waits and tries again must not be in the way of another one that does the same.
        for byte in bytes(used, unshared) {
            let _ = fcntl(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte, 1);
        }
    }
    result
}

/// The bytes that stand for these permissions.
fn bytes<'p>(
    used: &'p [(i64, &'static str)],
    unshared: &'p [(i64, &'static str)],
) -> impl Iterator<Item = i64> + use<'p> {
    used.iter().map(|p| USED + p.0).chain(unshared.iter().map(|p| UNSHARED + p.0))
}

fn try_lock(file: &File, used: &[(i64, &'static str)], unshared: &[(i64, &'static str)]) -> Result<(), LockError> {
    for byte in bytes(used, unshared) {
        match fcntl(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1) {
            Ok(_) => {}
            Err(error) if is_unsupported(&error) => return Ok(()),
            Err(error) => return Err(LockError::Failed(byte, error)),
        }
    }
    // Only after our own locks stand, as QEMU does it: of two that start at once, at least one sees the other.
    let taken = |byte| fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1).map_err(|e| LockError::Failed(byte, e));
    for &(permission, name) in used {
        if taken(UNSHARED + permission)? {
            return Err(LockError::Needed(name));
        }
    }
    for &(permission, name) in unshared {
        if taken(USED + permission)? {
            return Err(LockError::Shared(name));
        }
    }
    Ok(())
}

/// File systems without such locks: nobody can have taken one.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOLCK))
}

/// Take a lock on `length` bytes from `first`, or ask whether somebody's lock is in the way of it.
fn fcntl(file: &File, command: libc::c_int, kind: libc::c_int, first: i64, length: i64) -> io::Result<bool> {
    // SAFETY: all-zero bytes are a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    lock.l_start = first;
    lock.l_len = length;
    // SAFETY: `lock` is a valid `flock` that outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(command == libc::F_OFD_GETLK && libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
