//! An image that is opened once and kept by descriptor.

use crate::plugins::ImageRead;
use rustix::fs::{fstat, open, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

impl Access {
    /// The flags to open with. NONBLOCK: a FIFO must not hold the program up before its type is known (it means
    /// nothing for files and block devices); NOCTTY: nor must a terminal become ours.
    #[must_use]
    pub fn flags(self) -> OFlags {
        let mode = match self {
            Self::ReadOnly => OFlags::RDONLY,
            Self::ReadWrite => OFlags::RDWR,
        };
        mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
    }
}

/// Which file it is, whatever its names are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Number of the file system, or, for a block device, of the device itself.
    pub device: u64,
    /// Number of the file in the file system; 0 for a block device.
    pub inode: u64,
}

impl FileIdentity {
    /// The identity in a `stat`. Two nodes of one block device are the same image.
    #[must_use]
    pub fn of(stat: &Stat) -> Self {
        if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
            Self { device: stat.st_rdev, inode: 0 }
        } else {
            Self { device: stat.st_dev, inode: stat.st_ino }
        }
    }
}

/// Why an image cannot be opened. One clause; the caller names the image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is nothing of that name.
    #[error("does not exist")]
    NotFound,
    /// It is something else.
    #[error("is {0}: an image is a regular file or a block device")]
    NotAnImage(&'static str),
    /// The host says no.
    #[error("cannot be opened for {what}: {}", errno_text(.errno.raw_os_error()))]
    Refused {
        /// "reading" or "reading and writing".
        what: &'static str,
        /// What the host said.
        errno: Errno,
    },
}

/// The text of an errno, without the number that Rust appends.
#[must_use]
pub fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

impl OpenError {
    /// The error for a failed `open`.
    #[must_use]
    pub fn from_errno(errno: Errno, access: Access) -> Self {
        match errno {
            Errno::NOENT | Errno::NOTDIR => Self::NotFound,
            Errno::ISDIR => Self::NotAnImage("a directory"),
            // What opening a socket says.
            Errno::NXIO => Self::NotAnImage("a socket or a device that is not there"),
            errno => {
                let what = if access == Access::ReadOnly { "reading" } else { "reading and writing" };
                Self::Refused { what, errno }
            }
        }
    }
}

/// An opened image: a regular file or a block device.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    access: Access,
    block_device: bool,
    length: u64,
    identity: FileIdentity,
}

impl ImageFile {
    /// Open an image by name. Links are followed.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        loop {
            match open(path, access.flags(), Mode::empty()) {
                Ok(fd) => return Self::from_fd(fd, path.to_owned(), access),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(OpenError::from_errno(errno, access)),
            }
        }
    }

    /// Take an open descriptor; `path` is its name for messages.
    ///
    /// # Errors
    /// [`OpenError::NotAnImage`] for anything but a regular file and a block device.
    pub fn from_fd(fd: OwnedFd, path: PathBuf, access: Access) -> Result<Self, OpenError> {
        let refused = |errno| OpenError::from_errno(errno, access);
        let stat = fstat(&fd).map_err(refused)?;
        let block_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            FileType::Directory => return Err(OpenError::NotAnImage("a directory")),
            FileType::Fifo => return Err(OpenError::NotAnImage("a FIFO")),
            FileType::CharacterDevice => return Err(OpenError::NotAnImage("a character device")),
            FileType::Socket => return Err(OpenError::NotAnImage("a socket")),
            _ => return Err(OpenError::NotAnImage("of an unknown type")),
        };
        let identity = FileIdentity::of(&stat);
        let mut image = Self { file: File::from(fd), path, access, block_device, length: 0, identity };
        image.length = image.current_length().map_err(refused)?;
        Ok(image)
    }

    /// Length in bytes now. The end of a block device is where its size (`BLKGETSIZE64`) says.
    ///
    /// # Errors
    /// What the host says.
    pub fn current_length(&self) -> Result<u64, Errno> {
        rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))
    }

    /// Whether the name still leads to this file.
    #[must_use]
    pub fn is_still_named(&self) -> bool {
        rustix::fs::stat(&self.path).is_ok_and(|stat| FileIdentity::of(&stat) == self.identity)
    }

    /// Its name, as it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it was opened for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Whether it is a block device, whose length is fixed.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Length in bytes when it was opened.
    #[must_use]
    pub fn initial_length(&self) -> u64 {
        self.length
    }

    /// Which file it is.
    #[must_use]
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }
}

impl AsFd for ImageFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl ImageRead for ImageFile {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let Some(at) = offset.checked_add(done as u64).filter(|&at| at < self.length) else { break };
            match self.file.read_at(&mut buffer[done..], at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn what_is_not_an_image_is_named_and_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let text = |path: &Path| ImageFile::open(path, access).unwrap_err().to_string();
            assert!(text(&path("fifo")).contains("is a FIFO"));
            assert!(text(&path("socket")).contains("socket"));
            assert!(text(dir.path()).contains("is a directory"));
            assert!(text(Path::new("/dev/null")).contains("is a character device"));
            assert_eq!(text(&path("missing")), "does not exist");
        }
    }

    #[test]
    fn names_and_identity() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, vec![7; 1000]).unwrap();
        std::fs::hard_link(&a, &b).unwrap();
        let first = ImageFile::open(&a, Access::ReadWrite).unwrap();
        let second = ImageFile::open(&b, Access::ReadOnly).unwrap();
        assert_eq!(first.identity(), second.identity());
        assert_eq!(first.initial_length(), 1000);
        let mut buffer = [0; 16];
        assert_eq!(first.read_at(990, &mut buffer).unwrap(), 10);
        assert_eq!(first.read_at(u64::MAX, &mut buffer).unwrap(), 0);
        assert!(first.is_still_named());
        std::fs::rename(dir.path().join("b"), dir.path().join("c")).unwrap();
        assert!(first.is_still_named() && !second.is_still_named());
    }

    #[test]
    fn errno_texts_carry_no_numbers() {
        assert_eq!(errno_text(libc::ENOSPC), "No space left on device");
    }
}
