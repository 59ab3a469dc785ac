//! Locks as QEMU takes them, so that an image that a running virtual machine uses is refused, and the other way round.
//!
//! They are open-file-description locks on single bytes of the image, at which nothing is stored: byte `100 + n` says "I
//! hold permission n", byte `200 + n` says "I do not share permission n". All are shared locks; who wants a
//! permission looks for a lock on the byte that denies it.

use super::file::errno_text;
use rustix::fd::{AsFd, AsRawFd};

/// Byte of the first "I hold" lock.
const HOLD: u64 = 100;
/// Byte of the first "I do not share" lock.
const UNSHARE: u64 = 200;

/// The permissions in the order of their numbers.
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// What an image is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// It is read and must not change meanwhile: others may read it too.
    Read,
    /// It is changed: nobody else may use it.
    Write,
}

impl LockMode {
    /// The numbers of the permissions that are held.
    const fn held(self) -> &'static [u64] {
        match self {
            Self::Read => &[0],
            Self::Write => &[0, 1, 3],
        }
    }

    /// The numbers of the permissions that are not shared.
    const fn unshared(self) -> &'static [u64] {
        &[1, 3]
    }
}

/// What came of locking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    /// The locks are held for as long as the file is open.
    Held,
    /// The file system has no such locks.
    Unsupported,
}

/// Another process uses the image. One clause, in QEMU's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InUse(pub String);

enum Query {
    Free,
    Conflict,
}

fn range(kind: libc::c_int, byte: u64) -> libc::flock {
    // SAFETY: `flock` is a C structure of integers, for which zero is a value. `l_pid` has to be 0.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are 0 to 2, the bytes below 300.
    range.l_type = libc::c_short::try_from(kind).unwrap_or(0);
    range.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or(0);
    range.l_start = i64::try_from(byte).unwrap_or(0);
    range.l_len = 1;
    range
}

/// `Ok(false)` if another holds an exclusive lock there.
fn take(fd: &impl AsFd, byte: u64) -> Result<bool, i32> {
    let range = range(libc::F_RDLCK, byte);
    // SAFETY: the descriptor is open, and `range` is a valid `flock` for the duration of the call.
    let status = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_SETLK, std::ptr::from_ref(&range)) };
    if status == 0 {
        return Ok(true);
    }
    match std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
        libc::EAGAIN | libc::EACCES => Ok(false),
        errno => Err(errno),
    }
}

fn query(fd: &impl AsFd, byte: u64) -> Result<Query, i32> {
    let mut range = range(libc::F_WRLCK, byte);
    // SAFETY: the descriptor is open, and `range` is a valid `flock` that the call may change.
    let status = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_GETLK, std::ptr::from_mut(&mut range)) };
    if status != 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO));
    }
    Ok(if i32::from(range.l_type) == libc::F_UNLCK { Query::Free } else { Query::Conflict })
}

/// Lock an image until its descriptor is closed.
///
/// # Errors
/// [`InUse`] when another process uses the image in a way that does not go together with `mode`.
pub fn lock(fd: &impl AsFd, mode: LockMode) -> Result<Locked, InUse> {
    let bytes = mode.held().iter().map(|n| HOLD + n).chain(mode.unshared().iter().map(|n| UNSHARE + n));
    for byte in bytes {
        match take(fd, byte) {
            Ok(true) => {}
            Ok(false) => return Err(InUse(format!("Failed to lock byte {byte}"))),
            // A file system without locks, as QEMU takes it too.
            Err(_) => return Ok(Locked::Unsupported),
        }
    }
    for (n, name) in (0u64..).zip(NAMES) {
        if mode.held().contains(&n) {
            ask(fd, UNSHARE + n, || format!("Failed to get \"{name}\" lock"))?;
        }
        if mode.unshared().contains(&n) {
            ask(fd, HOLD + n, || format!("Failed to get shared \"{name}\" lock"))?;
        }
    }
    Ok(Locked::Held)
}

fn ask(fd: &impl AsFd, byte: u64, text: impl Fn() -> String) -> Result<(), InUse> {
    match query(fd, byte) {
        Ok(Query::Free) => Ok(()),
        Ok(Query::Conflict) => Err(InUse(text())),
        Err(errno) => Err(InUse(format!("{} ({})", text(), errno_text(errno)))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn readers_go_together_and_writers_do_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
        let (a, b, c) = (open(), open(), open());
        assert_eq!(lock(&a, LockMode::Read), Ok(Locked::Held));
        assert_eq!(lock(&b, LockMode::Read), Ok(Locked::Held));
        assert_eq!(lock(&c, LockMode::Write), Err(InUse("Failed to get \"write\" lock".to_owned())));
        drop((a, b, c));
        let (a, b, c) = (open(), open(), open());
        assert_eq!(lock(&a, LockMode::Write), Ok(Locked::Held));
        assert_eq!(lock(&b, LockMode::Write).unwrap_err().0, "Failed to get \"write\" lock");
        assert_eq!(lock(&c, LockMode::Read).unwrap_err().0, "Failed to get shared \"write\" lock");
        drop((a, b, c));
        assert_eq!(lock(&open(), LockMode::Write), Ok(Locked::Held));
    }
}
