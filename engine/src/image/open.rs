//! Opening an image of a chain: once, with the right mode; then it is locked, and its format found out.

use super::files::ExtraFile;
use super::write_target::Located;
use crate::devices::lock::{lock_read_only, lock_read_write};
use crate::error::Error;
use crate::escape::escape_path;
use crate::plugins::{FileImage, Plugin};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::ImageFacts;
use rustix::fs::OFlags;
use rustix::io::retry_on_intr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a file is, whatever its names: device and inode; for a block device the device that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity(bool, u64, u64);

impl Identity {
    /// The identity of a file with this metadata.
    #[must_use]
    pub fn of(metadata: &std::fs::Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self(true, metadata.rdev(), 0)
        } else {
            Self(false, metadata.dev(), metadata.ino())
        }
    }
}

/// An image file that is open.
#[derive(Debug)]
pub struct OpenedFile {
    /// The file.
    pub file: FileImage,
    /// Its path, for messages and for the names that it records.
    pub path: PathBuf,
    /// What it is.
    pub identity: Identity,
    /// A block device: its length is fixed.
    pub block_device: bool,
}

/// An image of a chain: open, locked, and looked at.
#[derive(Debug)]
pub struct ChainImage<'r> {
    /// The open file.
    pub opened: OpenedFile,
    /// The plugin of its format.
    pub plugin: &'r Plugin,
    /// What its header says.
    pub facts: ImageFacts,
    /// Its other files, once they are open.
    pub files: Vec<ExtraFile>,
    /// What it records of its parent is changed, and nothing else of it: a few bytes of its own file, which is open for
    /// writing. It is not emptied, and not a target.
    pub follows: bool,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be changed.
    ReadWrite,
    /// Only to be read.
    ReadOnly,
    /// Only to be read, whoever writes to it: it is not locked.
    Shared,
}

impl Access {
    /// A FIFO or a terminal must not block or take over the process: they are refused after the open.
    fn flags(self) -> OFlags {
        let mode = match self {
            Self::ReadWrite => OFlags::RDWR,
            Self::ReadOnly | Self::Shared => OFlags::RDONLY,
        };
        mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
    }
}

impl OpenedFile {
    /// Open a file that the operator named.
    ///
    /// # Errors
    /// `missing` if it is not there, [`ErrorCode::OpenFailed`].
    pub fn named(path: &Path, access: Access, missing: ErrorCode) -> Result<Self, Error> {
        let opened = retry_on_intr(|| rustix::fs::open(path, access.flags(), rustix::fs::Mode::empty()));
        Self::adopt(opened.map(File::from).map_err(io::Error::from), path.to_owned(), access, missing)
    }

    /// Open a file that an image names.
    ///
    /// # Errors
    /// As [`OpenedFile::named`], and [`ErrorCode::WriteTargetNotAllowed`] if a link leads outside.
    pub fn located(located: &Located, access: Access, missing: ErrorCode) -> Result<Self, Error> {
        Self::adopt(located.open(access.flags()), located.path(), access, missing)
    }

    fn adopt(opened: io::Result<File>, path: PathBuf, access: Access, missing: ErrorCode) -> Result<Self, Error> {
        let failed = |code, clause: String| Err(Error::image(&path, code, clause));
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::image(&path, missing, "does not exist").caused_by(&error));
            }
            Err(error) if error.raw_os_error() == Some(libc::EXDEV) => {
                let clause =
                    "a symbolic link leads outside the directory: name the file with -b, or allow its directory \
                              with --allow-backing-dir";
                return failed(ErrorCode::WriteTargetNotAllowed, clause.into());
            }
            Err(error) if error.raw_os_error() == Some(libc::EISDIR) => {
                return failed(ErrorCode::OpenFailed, "is a directory, not an image".into());
            }
            Err(error) if access == Access::ReadWrite => {
                return Err(Error::io(&path, ErrorCode::OpenFailed, "cannot be opened for writing", &error));
            }
            Err(error) => return Err(Error::io(&path, ErrorCode::OpenFailed, "cannot be opened", &error)),
        };
        let metadata = file
            .metadata()
            .map_err(|error| Error::image(&path, ErrorCode::OpenFailed, format!("cannot be looked at: {error}")))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return failed(ErrorCode::OpenFailed, "is not a regular file or block device".into());
        }
        let file = FileImage::new(file).map_err(|error| {
            Error::image(&path, ErrorCode::OpenFailed, format!("its length cannot be found out: {error}"))
        })?;
        let (identity, block_device) = (Identity::of(&metadata), kind.is_block_device());
        Ok(Self { file, path, identity, block_device })
    }

    /// Lock the file as QEMU does, so that no virtual machine and no other tool uses it in a way that conflicts.
    ///
    /// # Errors
    /// [`ErrorCode::ImageInUse`].
    pub fn lock(self, access: Access) -> Result<Self, Error> {
        let locked = match access {
            Access::ReadWrite => lock_read_write(self.file.file()),
            Access::ReadOnly => lock_read_only(self.file.file()),
            Access::Shared => Ok(()),
        };
        match locked {
            Ok(()) => Ok(self),
            Err(error) => {
                let clause = format!("{error}: Is another process using the image [{}]?", escape_path(&self.path));
                Err(Error::image(&self.path, ErrorCode::ImageInUse, clause))
            }
        }
    }

    /// The directory that the names in this image begin at, as an absolute path.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        let absolute = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        absolute.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned)
    }
}
