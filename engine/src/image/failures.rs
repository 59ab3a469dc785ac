//! Why a file cannot be opened or written: what the kernel says, in words, and what it says only to who asks.

use super::access::Access;
use crate::confine::calls::BLKROGET;
use crate::error::{reason, Error};
use crate::plugins::{Bundle, FileImage};
use instar_guest_abi::ErrorCode;
use rustix::fs::{AtFlags, Mode, OFlags, StatVfsMountFlags, StatxAttributes, StatxFlags};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The error for a file that could not be opened. `missing` is the code of one that is not there.
pub(crate) fn open_error(path: &Path, access: Access, missing: ErrorCode, error: &io::Error) -> Error {
    let writing = access == Access::ReadWrite;
    let purpose = if writing { "opened for writing" } else { "opened" };
    let (code, clause) = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => (missing, "does not exist".to_owned()),
        Some(libc::EXDEV) => (
            ErrorCode::WriteTargetNotAllowed,
            "a symbolic link leads outside the directory: name the file with -b, or allow its directory with \
             --allow-backing-dir"
                .to_owned(),
        ),
        Some(libc::EISDIR) => (ErrorCode::OpenFailed, directory(path)),
        Some(libc::EROFS) => (ErrorCode::ReadOnly, READ_ONLY_FILE_SYSTEM.to_owned()),
        Some(libc::EPERM) if writing && is_protected(path) => (ErrorCode::ReadOnly, IMMUTABLE.to_owned()),
        Some(libc::EACCES | libc::EPERM) => {
            let right = if writing { "read and write" } else { "read" };
            let clause = format!(
                "cannot be {purpose}: permission denied; run this as a user who may {right} it, and pass through its \
                 directories"
            );
            (ErrorCode::PermissionDenied, clause)
        }
        Some(libc::ETXTBSY) => {
            (ErrorCode::ImageInUse, "is being executed, or used as swap space: it is no image to write to".to_owned())
        }
        Some(libc::EBUSY) => (
            ErrorCode::ImageInUse,
            "is mounted, used as swap space, a part of another device, or held by a program that wants it alone: end that first \
             (`lsblk` and `fuser` show it)"
                .to_owned(),
        ),
        _ => (ErrorCode::OpenFailed, format!("cannot be {purpose}: {}", reason(error))),
    };
    Error::image(path, code, clause).caused_by(error)
}

/// What is said of a directory: one of Parallels has images in it, and a description of them.
fn directory(path: &Path) -> String {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let description = rustix::fs::open(path.join("DiskDescriptor.xml"), flags, Mode::empty());
    let description = description.ok().and_then(|file| FileImage::new(File::from(file)).ok());
    let hint = match description {
        Some(description) => format!(": of the Parallels disk in it, {}", Bundle::read(&description)),
        None if path.extension().is_some_and(|ending| ending == "hdd") => {
            format!(": of a Parallels disk, {}", Bundle::Unknown)
        }
        None => String::new(),
    };
    format!("is a directory, not an image{hint}")
}

const READ_ONLY_FILE_SYSTEM: &str =
    "is on a read-only file system: remount that for writing, or copy the image elsewhere";
const IMMUTABLE: &str = "is immutable or append-only: allow changes with chattr -i -a";
const READ_ONLY_DEVICE: &str =
    "is a read-only block device: allow writing with blockdev --setrw, or at whatever made it";

/// Refuse a file that cannot be written to, although it may be open for writing: a kernel opens a read-only block device so.
/// It need not be open for writing, so that a dry run can ask, too.
///
/// # Errors
/// [`ErrorCode::ReadOnly`].
pub(super) fn check_writable(path: &Path, file: &File, block_device: bool) -> Result<(), Error> {
    let refused = |clause: &str| Err(Error::image(path, ErrorCode::ReadOnly, clause));
    if block_device {
        return if is_read_only_device(file) { refused(READ_ONLY_DEVICE) } else { Ok(()) };
    }
    if rustix::fs::fstatvfs(file).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        return refused(READ_ONLY_FILE_SYSTEM);
    }
    let attributes = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty());
    if attributes.is_ok_and(|found| found.stx_attributes.intersects(PROTECTED)) {
        return refused(IMMUTABLE);
    }
    Ok(())
}

/// Attributes of a file that nobody may change in place.
const PROTECTED: StatxAttributes = StatxAttributes::IMMUTABLE.union(StatxAttributes::APPEND);

/// Whether a file has such an attribute, for a message.
fn is_protected(path: &Path) -> bool {
    let attributes = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::empty());
    attributes.is_ok_and(|found| found.stx_attributes.intersects(PROTECTED))
}

fn is_read_only_device(file: &File) -> bool {
    let mut read_only: libc::c_int = 0;
    // SAFETY: the request stores an int; what fails stores nothing, and writing will say why.
    let asked = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET.into(), &raw mut read_only) };
    asked == 0 && read_only != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_forbidden_and_read_only_is_told_apart() {
        let code = |errno, access| {
            let error = io::Error::from_raw_os_error(errno);
            open_error(Path::new("/absent"), access, ErrorCode::BackingNotFound, &error).code
        };
        for access in [Access::ReadOnly, Access::ReadWrite, Access::Shared] {
            assert_eq!(code(libc::ENOENT, access), ErrorCode::BackingNotFound);
            assert_eq!(code(libc::EACCES, access), ErrorCode::PermissionDenied);
            assert_eq!(code(libc::EPERM, access), ErrorCode::PermissionDenied);
            assert_eq!(code(libc::EROFS, access), ErrorCode::ReadOnly);
            assert_eq!(code(libc::EBUSY, access), ErrorCode::ImageInUse);
            assert_eq!(code(libc::EIO, access), ErrorCode::OpenFailed);
        }
    }
}
