//! Moving bytes between a file and memory, whole: short transfers and interruptions are gone on with.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

/// A transfer that failed: so many bytes were done before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// Bytes done.
    pub done: u64,
    /// What the host said.
    pub errno: Errno,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file into memory; past the end of the file, zeroes.
    Read,
    /// From memory into the file.
    Write,
}

/// Transfer all of `slices`, one after the other, from `offset` on. Guest memory is read and written by the kernel,
/// without a copy in between. Returns the number of system calls.
pub(super) fn transfer(
    fd: BorrowedFd<'_>,
    direction: Direction,
    offset: u64,
    slices: &[VolatileSlice<'_>],
) -> Result<u64, Failed> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<libc::iovec> = guards
        .iter()
        .filter(|guard| guard.len() > 0)
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let mut rest = vectors.as_mut_slice();
    let (mut done, mut calls) = (0u64, 0);
    while !rest.is_empty() {
        let fail = |errno| Failed { done, errno };
        let at = offset.checked_add(done).and_then(|at| i64::try_from(at).ok()).ok_or_else(|| fail(Errno::OVERFLOW))?;
        // A doorbell has fewer requests than a call takes vectors (1024).
        let count = libc::c_int::try_from(rest.len()).map_err(|_| fail(Errno::INVAL))?;
        calls += 1;
        // SAFETY: the vectors describe guest memory that is mapped for as long as `slices` live. Nobody in this process
        // holds a reference to it, only volatile slices, and the vCPU is stopped while its requests are served; what
        // the bytes are does not matter.
        let moved = unsafe {
            match direction {
                Direction::Read => libc::preadv(fd.as_raw_fd(), rest.as_ptr(), count, at),
                Direction::Write => libc::pwritev(fd.as_raw_fd(), rest.as_ptr(), count, at),
            }
        };
        match usize::try_from(moved) {
            Ok(0) if direction == Direction::Read => {
                zero_rest(rest);
                break;
            }
            Ok(0) => return Err(fail(Errno::NOSPC)),
            Ok(moved) => {
                done += moved as u64;
                rest = advance(rest, moved);
            }
            Err(_) => match last_errno() {
                Errno::INTR => {}
                errno => return Err(fail(errno)),
            },
        }
    }
    Ok(calls)
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Drop the first `moved` bytes.
fn advance(vectors: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    while let Some(vector) = vectors.get(whole).filter(|vector| vector.iov_len <= moved) {
        moved -= vector.iov_len;
        whole += 1;
    }
    let (_, rest) = vectors.split_at_mut(whole);
    if let Some(first) = rest.first_mut() {
        // SAFETY: `moved` is less than the length of the memory that the vector describes.
        first.iov_base = unsafe { first.iov_base.cast::<u8>().add(moved) }.cast();
        first.iov_len -= moved;
    }
    rest
}

/// The file ended: the rest reads as zeroes.
fn zero_rest(vectors: &[libc::iovec]) {
    for vector in vectors {
        // SAFETY: as for the system calls of `transfer`: mapped memory that is nobody's reference.
        unsafe { std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, vector.iov_len) };
    }
}

/// Write all of `bytes` at `offset`.
pub(super) fn write_all(fd: &impl AsFd, bytes: &[u8], offset: u64) -> Result<(), Failed> {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        let fail = |errno| Failed { done: done as u64, errno };
        let at = offset.checked_add(done as u64).ok_or_else(|| fail(Errno::OVERFLOW))?;
        match rustix::io::pwrite(fd, rest, at) {
            Ok(0) => return Err(fail(Errno::NOSPC)),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(fail(errno)),
        }
    }
    Ok(())
}

/// Fill `bytes` from `offset` on; fewer only at the end of the file.
pub(super) fn read_full(fd: &impl AsFd, bytes: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.checked_add(done as u64).ok_or(Errno::OVERFLOW)?;
        match rustix::io::pread(fd, rest, at) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}
