//! Sharing extents between files, where the file system can (reflinks): data that is not moved at all.

use super::retry;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Have `length` bytes of the target be those of the source, in the same place on the disk until one of them is written.
///
/// # Errors
/// The kernel's: see [`is_refusal`].
pub fn share(source: &File, from: u64, target: &File, to: u64, length: u64) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: source.as_raw_fd().into(),
        src_offset: from,
        src_length: length,
        dest_offset: to,
    };
    // ioctl_ficlonerange(2). It shares a whole range or nothing of it.
    retry(|| {
        // SAFETY: both descriptors are open while the files are borrowed, and the kernel only reads the structure.
        let done = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
        if done == 0 {
            return Ok(());
        }
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Err(rustix::io::Errno::from_raw_os_error(errno))
    })
}

/// Whether the error means "not these ranges", or "not between these files": they have to be copied.
pub fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL)) || is_final(error)
}

/// Whether the error means that no range will ever be shared between these files.
pub fn is_final(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EXDEV | libc::ENOTTY | libc::EBADF | libc::EPERM | libc::ETXTBSY | libc::ENOSYS)
    )
}
