//! `instar recover`: restoring a file that an interrupted atomic commit left in the middle of a change.
//!
//! The undo log lies beside the file, and is as hostile as an image, because every user with write access to the directory can
//! make one. It counts only if it is a regular file with one name, on the same file system, owned by the file's owner or root
//! and writable for nobody else, and if it identifies the file by name, inode and time of creation. It is [read](crate::undo)
//! completely before the file changes.
//!
//! The order, and the crash that each step survives: the file is written back and flushed, the log is cut to nothing and flushed,
//! and then removed. Before the cut, the log undoes everything once more; after it, nothing.

use crate::bytes::Bytes;
use crate::confine::{Needs, Reach, Work};
use crate::error::{Error, Role};
use crate::escape::escape_path;
use crate::image::{prepare_to_lock, NamedFile, OpenedFile};
use crate::lookup::{Directory, Identity};
use crate::operation::Session;
use crate::undo::{log_name, Log, Restored};
use instar_guest_abi::ErrorCode;
use rustix::fs::{
    fstat, fsync, ftruncate, openat, statat, statx, unlinkat, AtFlags, FileType, Mode, OFlags, StatxFlags,
};
use rustix::io::{retry_on_intr, Errno};
use serde::Serialize;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct RecoverRequest {
    /// The file.
    pub image: PathBuf,
    /// Seconds to wait while it is in use.
    pub wait: u64,
}

/// The result. Serializes to the JSON of `docs/recover.md`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RecoverOutcome {
    /// Absolute path of the file.
    pub image: String,
    /// Whether it had an undo log: without one, there was nothing to do.
    pub log: bool,
    /// Whether it was restored; otherwise the commit into it was complete.
    pub restored: bool,
    /// Bytes that were written back, or are holes again.
    pub bytes_restored: u64,
    /// Length of the file in bytes.
    pub length: u64,
}

/// A log that is open, and where it lies.
struct Found {
    path: PathBuf,
    file: File,
    /// To remove it, and to make that durable.
    directory: Directory,
    flushed: OwnedFd,
}

/// Restore a file.
///
/// # Errors
/// One line that names the file, or its log, and what to do. The file is untouched unless the line says otherwise.
pub fn run_recover(request: &RecoverRequest, session: &Session) -> Result<RecoverOutcome, Error> {
    recover(request, session).map_err(|error| error.in_role(Role::Image))
}

fn recover(request: &RecoverRequest, session: &Session) -> Result<RecoverOutcome, Error> {
    let named = NamedFile::new(&request.image);
    prepare_to_lock(session.cancel(), request.wait, [&named], &[]);
    let opened = named.open_unfinished()?;
    let (directory, name) = opened.place()?;
    let image = opened.settled_path().to_string_lossy().into_owned();
    let Some(found) = find(&opened, directory.clone(), &directory.path().join(log_name(&name)))? else {
        return Ok(RecoverOutcome { image, log: false, restored: false, bytes_restored: 0, length: opened.length() });
    };
    session.begin(Reach::default().add_names(&found.directory), Work::Recover, &Needs::default());
    let refused = |clause: String| Error::image(&found.path, ErrorCode::RecoveryNeeded, clause);
    let restored = if found.length()? == 0 {
        None
    } else {
        let log = Log::read(&found.file).map_err(|why| {
            refused(format!(
                "is no sound undo log: {why}; '{}' was not touched: restore it from a backup",
                escape_path(&opened.path)
            ))
        })?;
        let clause = "is the undo log of another file, which was moved, copied or replaced: if this one is as it should be, remove \
                      the log";
        let of_it = is_of(&opened, &log, &name)
            .map_err(|errno| Error::io(&opened.path, ErrorCode::OpenFailed, "cannot be looked at", &errno.into()))?;
        if !of_it {
            return Err(refused(clause.to_owned()));
        }
        // A crash while the file was given back what it was leaves it as long as that.
        if !log.goes_with(opened.length()) {
            let clause = format!(
                "is the undo log of a file of {} that was not cut since, and '{}' has only {}: it was restored or made anew; \
                 if it is as it should be, remove the log",
                Bytes(log.header().length),
                escape_path(&opened.path),
                Bytes(opened.length())
            );
            return Err(refused(clause));
        }
        Some(log.apply(opened.file.file()).map_err(|error| {
            let what = "cannot be given back all that it was: see to it that it can be written, and has room, and run the command again";
            Error::io(&opened.path, ErrorCode::OpenFailed, what, &error)
        })?)
    };
    found.remove()?;
    let Restored { bytes, length } = restored.unwrap_or(Restored { bytes: 0, length: opened.length() });
    Ok(RecoverOutcome { image, log: true, restored: restored.is_some(), bytes_restored: bytes, length })
}

/// Whether a log is of this file. The number of its device says nothing: it changes when the machine starts again.
fn is_of(opened: &OpenedFile, log: &Log<'_>, name: &OsStr) -> Result<bool, Errno> {
    let header = log.header();
    let file = opened.file.file();
    let born = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
    let born = born.filter(|found| found.stx_mask & StatxFlags::BTIME.bits() != 0);
    let born = born.map_or((0, 0), |found| (found.stx_btime.tv_sec.cast_unsigned(), found.stx_btime.tv_nsec));
    let inode = fstat(file)?.st_ino;
    Ok(header.name == name.as_bytes() && inode == header.inode && (header.born == born || header.born == (0, 0)))
}

/// Open the log of a file, if it has one, and refuse one that somebody else may have made.
fn find(opened: &OpenedFile, directory: Directory, path: &Path) -> Result<Option<Found>, Error> {
    let refused = |clause: &str| Err(Error::image(path, ErrorCode::RecoveryNeeded, clause));
    let failed = |what: &str, errno: Errno| Error::io(path, ErrorCode::OpenFailed, what, &io::Error::from(errno));
    let name = path.file_name().unwrap_or_default();
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // It is looked at before it is opened: that of a device or FIFO can have an effect.
    match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
        Ok(_) => return refused("is no regular file, and so no undo log: remove it"),
        Err(Errno::NOENT | Errno::NAMETOOLONG) => return Ok(None),
        Err(errno) => return Err(failed("cannot be looked at", errno)),
    }
    let file = retry_on_intr(|| openat(&directory, name, flags, Mode::empty()));
    let file = File::from(file.map_err(|errno| failed("cannot be opened", errno))?);
    let stat = fstat(&file).map_err(|errno| failed("cannot be looked at", errno))?;
    let of = fstat(opened.file.file()).map_err(|errno| failed("cannot be looked at", errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return refused("is no regular file, and so no undo log: remove it");
    }
    if stat.st_uid != of.st_uid && stat.st_uid != 0 {
        return refused("belongs neither to the owner of the image nor to root, and is not believed: remove it");
    }
    if stat.st_mode & 0o022 != 0 {
        return refused("can be written to by others, and is not believed: remove it");
    }
    if stat.st_nlink != 1 {
        return refused("has several names (hard links), and is not believed: remove them");
    }
    if stat.st_dev != of.st_dev {
        return refused("lies on another file system than the image, and is not believed: remove it");
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let flushed = openat(&directory, ".", flags, Mode::empty()).map_err(|errno| failed("cannot be removed", errno))?;
    Ok(Some(Found { path: path.to_owned(), file, directory, flushed }))
}

impl Found {
    fn failed(&self, what: &str, error: &io::Error) -> Error {
        Error::io(&self.path, ErrorCode::OpenFailed, what, error)
    }

    fn length(&self) -> Result<u64, Error> {
        self.file.metadata().map(|found| found.len()).map_err(|error| self.failed("cannot be looked at", &error))
    }

    /// The file is as it should be, durably: the log goes.
    fn remove(&self) -> Result<(), Error> {
        let done = |what: &'static str| {
            move |errno: Errno| {
                self.failed(&format!("{what}, and the image is as it should be: run the command again"), &errno.into())
            }
        };
        retry_on_intr(|| ftruncate(&self.file, 0)).map_err(done("cannot be cut"))?;
        retry_on_intr(|| fsync(&self.file)).map_err(done("cannot be flushed"))?;
        let name = self.path.file_name().unwrap_or_default();
        let own = fstat(&self.file).map(|stat| Identity::of(&stat)).map_err(done("cannot be looked at"))?;
        if self.directory.entry(name) == Ok(own) {
            unlinkat(&self.directory, name, AtFlags::empty()).map_err(done("cannot be removed"))?;
        }
        // A crash that brings it back brings back an empty one.
        retry_on_intr(|| fsync(&self.flushed)).map_err(done("is in a directory that cannot be flushed"))
    }
}
