//! Opening an image of a chain: once, with the right mode, after a check of its kind; then it is locked and identified.

use super::access::Access;
use super::advice::{RecordedRole, Recorder};
use super::failures::{check_writable, open_error};
use super::gate::Located;
use super::named::NamedFile;
use super::{locking, loop_device};
use crate::error::Error;
use crate::lookup::{Directory, Identity};
use crate::plugins::{FileImage, ImageRead as _};
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, openat, FileType, Mode, OFlags, Stat};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of a sector, of which a disk has a whole number.
const SECTOR: u64 = 512;

/// An image file that is open.
#[derive(Debug)]
pub struct OpenedFile {
    /// The file.
    pub file: FileImage,
    /// Its absolute path, for messages.
    pub path: PathBuf,
    /// Where the names that it records begin.
    pub directory: Directory,
    /// The directory that it was opened in.
    pub holder: Directory,
    /// Its name there, which may be a link if the operator gave it.
    pub name: OsString,
    /// What it is.
    pub identity: Identity,
    /// A block device: its length is fixed.
    pub block_device: bool,
    /// What is below it, if it is a loop device.
    pub below: Option<Identity>,
}

/// A file that was looked at and is to be opened.
pub(super) struct Looked<'a> {
    /// The directory that it is opened in.
    pub holder: &'a Directory,
    /// Its name there.
    pub name: &'a OsStr,
    /// What it was.
    pub stat: &'a Stat,
    /// The name may be a link: the operator's.
    pub follow: bool,
    /// A device must be in use by nobody, because this image chose it.
    pub exclusive: Option<&'a Recorder<'a>>,
}

impl Looked<'_> {
    /// Open it, if it still is what it was. `beside` is where the names in it begin.
    pub(super) fn open(
        &self,
        path: &Path,
        beside: &Directory,
        access: Access,
        missing: ErrorCode,
    ) -> Result<OpenedFile, Error> {
        let failed = |errno| failed(access, path, errno, missing);
        let kind = FileType::from_raw_mode(self.stat.st_mode);
        let block_device = match kind {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            FileType::Directory => return Err(failed(Errno::ISDIR)),
            _ => return Err(Error::image(path, ErrorCode::OpenFailed, "is not a regular file or block device")),
        };
        let mut flags = access.flags();
        flags.set(OFlags::NOFOLLOW, !self.follow);
        // Without O_CREAT it says of a block device that nobody may have mounted it, or built something on it (open(2)).
        flags.set(OFlags::EXCL, self.exclusive.is_some() && block_device);
        let replaced = || {
            let clause = "was replaced by another file while it was being opened: run the command again";
            Error::image(path, ErrorCode::OpenFailed, clause)
        };
        let descriptor = match retry_on_intr(|| openat(self.holder, self.name, flags, Mode::empty())) {
            Ok(descriptor) => descriptor,
            // A link, a socket or a FIFO without a reader took its place.
            Err(Errno::LOOP | Errno::NXIO) => return Err(replaced()),
            Err(errno) => {
                let chosen_by = self.exclusive.filter(|_| errno == Errno::BUSY);
                return Err(chosen_by.map_or_else(|| failed(errno), |recorder| recorder.claimed(path)));
            }
        };
        let identity = Identity::of(self.stat);
        if Identity::of(&fstat(&descriptor).map_err(failed)?) != identity {
            return Err(replaced());
        }
        let below = if block_device { loop_device::below(&descriptor, self.stat) } else { None };
        let file = FileImage::new(File::from(descriptor)).map_err(|error| length_error(path, &error))?;
        let (directory, holder, name) = (beside.clone(), self.holder.clone(), self.name.to_owned());
        let path = path.to_owned();
        let opened = OpenedFile { file, path, directory, holder, name, identity, block_device, below };
        if access == Access::ReadWrite {
            opened.check_writable()?;
        }
        if access == Access::Shared {
            opened.refuse_unfinished()?;
        }
        Ok(opened)
    }
}

impl NamedFile {
    /// Open it.
    ///
    /// # Errors
    /// `missing` if it is not there; [`ErrorCode::PermissionDenied`], [`ErrorCode::ReadOnly`], [`ErrorCode::OpenFailed`].
    pub fn open(&self, access: Access, missing: ErrorCode) -> Result<OpenedFile, Error> {
        let (directory, stat) = match (self.directory(), self.found()) {
            (Some(directory), Ok(stat)) => (directory, stat),
            (_, Err(errno)) => {
                let error = failed(access, self.path(), errno, missing);
                return Err(match self.near() {
                    Some(near) => Error::image(self.path(), error.code, format!("does not exist; '{near}' does"))
                        .with_errno(errno.raw_os_error()),
                    None => error,
                });
            }
            (None, Ok(_)) => return Err(failed(access, self.path(), Errno::NOENT, missing)),
        };
        let looked = Looked { holder: directory, name: self.name(), stat, follow: true, exclusive: None };
        looked.open(self.path(), directory, access, missing)
    }
}

impl NamedFile {
    /// Open it to be given back what it was, and lock it: with an undo log beside it.
    ///
    /// # Errors
    /// As [`NamedFile::open`] and [`OpenedFile::lock`].
    pub fn open_unfinished(&self) -> Result<OpenedFile, Error> {
        let opened = self.open(Access::ReadWrite, ErrorCode::ImageNotFound)?;
        locking::lock(opened.file.file(), &opened.path, Access::ReadWrite)?;
        Ok(opened)
    }
}

/// Why a file could not be looked at or opened.
fn failed(access: Access, path: &Path, errno: Errno, missing: ErrorCode) -> Error {
    open_error(path, access, missing, &io::Error::from(errno))
}

impl OpenedFile {
    /// Open a file that the operator named.
    ///
    /// # Errors
    /// `missing` if it is not there; what [`NamedFile::open`] gives.
    pub fn named(path: &Path, access: Access, missing: ErrorCode) -> Result<Self, Error> {
        NamedFile::new(path).open(access, missing)
    }

    /// Open a file that an image names. If it is to be changed and the operator did not name it, too, it must be in use by
    /// nobody else.
    ///
    /// # Errors
    /// [`ErrorCode::PermissionDenied`], [`ErrorCode::ReadOnly`], [`ErrorCode::OpenFailed`];
    /// [`ErrorCode::WriteTargetNotAllowed`] for a device that is mounted.
    pub fn located(located: &Located, recorder: &Recorder<'_>, access: Access) -> Result<Self, Error> {
        let Located { reached, path, by_operator, .. } = located;
        let exclusive = ((access == Access::ReadWrite || recorder.role == RecordedRole::Target) && !by_operator)
            .then_some(recorder);
        let holder = reached.holder.directory();
        let looked = Looked { holder, name: &reached.name, stat: &reached.stat, follow: false, exclusive };
        looked.open(path, &reached.beside, access, ErrorCode::BackingNotFound)
    }

    /// Refuse a file that is read-only for every user. It need not be open for writing.
    ///
    /// # Errors
    /// [`ErrorCode::ReadOnly`].
    pub fn check_writable(&self) -> Result<(), Error> {
        check_writable(&self.path, self.file.file(), self.block_device)
    }

    /// Its absolute path, with the links of its directory followed and those of its own name kept.
    #[must_use]
    pub fn settled_path(&self) -> PathBuf {
        match self.path.file_name() {
            Some(name) => self.directory.clone().really().path().join(name),
            None => self.path.clone(),
        }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.file.length()
    }

    /// Whether it is no disk as it is: no disk ends within a sector.
    pub(super) fn ends_within_a_sector(&self) -> bool {
        !self.length().is_multiple_of(SECTOR)
    }

    /// Lock the file as QEMU does, so that no virtual machine and no other tool uses it in a way that conflicts.
    ///
    /// # Errors
    /// [`ErrorCode::ImageInUse`], and what else [waiting](super::prepare_to_lock) gives; [`ErrorCode::RecoveryNeeded`].
    pub fn lock(self, access: Access) -> Result<Self, Error> {
        locking::lock(self.file.file(), &self.path, access)?;
        // Only now: a commit that runs has one as well.
        if access != Access::Shared {
            self.refuse_unfinished()?;
        }
        self.measured_anew()
    }

    /// Do the same for a file that has no name yet.
    ///
    /// # Errors
    /// As [`OpenedFile::lock`].
    pub fn lock_unnamed(self, access: Access) -> Result<Self, Error> {
        locking::lock(self.file.file(), &self.path, access)?;
        self.measured_anew()
    }

    /// The previous user may have made it longer.
    fn measured_anew(self) -> Result<Self, Error> {
        let file = FileImage::new(self.file.into_file()).map_err(|error| length_error(&self.path, &error))?;
        Ok(Self { file, ..self })
    }
}

fn length_error(path: &Path, error: &io::Error) -> Error {
    Error::image(path, ErrorCode::OpenFailed, format!("its length cannot be found out: {error}"))
}
