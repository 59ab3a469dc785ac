//! `instar recover`: restoring a file that an interrupted atomic commit left in the middle of a change.
//!
//! The undo log lies beside the file, and is as hostile as an image, because every user with write access to the directory can
//! make one. It counts only if it is a regular file with one name, on the same file system, owned by the file's owner or root
//! and writable for nobody else, and if it identifies the file by name, inode and time of creation; a block device, whose log lies in a
//! directory of the operator's choice, by what the system says that it is. It is [read](crate::undo) completely before the file
//! changes.
//!
//! The log is of the bytes that the commit changed. Somebody may have restored the file since, in place, and the old bytes would
//! damage that: so a file that was written long after the commit was alive, or that differs where the commit changed nothing, is
//! refused unless the operator insists. So is one whose overlay has changed (`committed.rs`): another commit may have emptied it.
//!
//! The order, and the crash that each step survives: the file is written back and flushed, the log is cut to nothing and flushed,
//! and then removed. Before the cut, the log undoes everything once more; after it, nothing.

mod committed;
mod namesake;

pub(crate) use namesake::refuse_namesake;

use crate::bytes::Bytes;
use crate::confine::{Needs, Reach, Work};
use crate::error::{Error, Role};
use crate::escape::{escape_path, shell_path};
use crate::image::{prepare_to_lock, use_undo_directory, DeviceIdentity, NamedFile, OpenedFile, UndoDirectory};
use crate::lookup::{Directory, Identity};
use crate::operation::Session;
use crate::undo::{born, log_name, Log, Restored};
use committed::refuse_committed_since;
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, fsync, ftruncate, openat, statat, unlinkat, AtFlags, FileType, Mode, OFlags};
use rustix::io::{retry_on_intr, Errno};
use serde::Serialize;
use std::ffi::OsString;
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
    /// The directory of the undo logs of block devices.
    pub undo_directory: Option<PathBuf>,
    /// Apply the log although the file was written since.
    pub force: bool,
}

/// The result. Serializes to the JSON of `docs/recover.md`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RecoverOutcome {
    /// Absolute path of the file.
    pub image: String,
    /// Whether it had an undo log: without one, there was nothing to do.
    pub log: bool,
    /// Of a block device, the directory in which its log was looked for; nothing for a file, whose log lies beside it.
    pub searched: Option<String>,
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
    let undo = use_undo_directory(request.undo_directory.as_deref())?;
    prepare_to_lock(session.cancel(), request.wait, None, [&named], &[]);
    let opened = named.open_unfinished()?;
    let place = Place::of(&opened, undo.as_ref())?;
    let image = opened.settled_path().to_string_lossy().into_owned();
    let log_path = place.directory.path().join(&place.log_name);
    let searched = place.device.as_ref().map(|_| place.directory.path().to_string_lossy().into_owned());
    let Some(found) = find(&opened, place.directory.clone(), &log_path)? else {
        if let (Some(undo), Some(device)) = (&undo, &place.device) {
            refuse_namesake(&opened, undo, device)?;
        }
        let length = opened.length();
        return Ok(RecoverOutcome { image, log: false, searched, restored: false, bytes_restored: 0, length });
    };
    // No file can be opened any more once the process is confined.
    let committed = refuse_committed_since(&opened, &found, undo.as_ref());
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
        let of_it = place
            .is_of(&opened, &log)
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
        if !request.force {
            refuse_written_since(&opened, &log, &found)?;
            committed?;
        }
        Some(log.apply(opened.file.file()).map_err(|error| {
            let what = "cannot be given back all that it was: see to it that it can be written, and has room, and run the command again";
            Error::io(&opened.path, ErrorCode::OpenFailed, what, &error)
        })?)
    };
    found.remove()?;
    let Restored { bytes, length } = restored.unwrap_or(Restored { bytes: 0, length: opened.length() });
    Ok(RecoverOutcome { image, log: true, searched, restored: restored.is_some(), bytes_restored: bytes, length })
}

/// Where the log of a file or device lies, and what it is called.
struct Place {
    directory: Directory,
    log_name: OsString,
    /// The name that the log has to say.
    name: OsString,
    device: Option<DeviceIdentity>,
}

impl Place {
    fn of(opened: &OpenedFile, undo: Option<&UndoDirectory>) -> Result<Self, Error> {
        if !opened.block_device {
            let (directory, name) = opened.place()?;
            return Ok(Self { directory, log_name: log_name(&name), name, device: None });
        }
        let undo = undo.ok_or_else(|| {
            let clause = "is a block device, whose undo log lies where the commit was told to keep it: name that directory with \
                          --undo-dir";
            Error::image(&opened.path, ErrorCode::BadUsage, clause)
        })?;
        let device = undo.identify(opened)?;
        let (log_name, name) = (device.log_name(), device.name.clone());
        Ok(Self { directory: undo.directory().clone(), log_name, name, device: Some(device) })
    }

    /// Whether a log is of this file. The number of its device says nothing: it changes when the machine starts again; nor does the
    /// name of a device.
    fn is_of(&self, opened: &OpenedFile, log: &Log<'_>) -> Result<bool, Errno> {
        let header = log.header();
        if let Some(device) = &self.device {
            return Ok(header.subject == device.digest);
        }
        let file = opened.file.file();
        let (born, inode) = (born(file), fstat(file)?.st_ino);
        let same = header.name == self.name.as_bytes() && inode == header.inode;
        Ok(same && header.subject == [0; 32] && (header.born == born || header.born == (0, 0)))
    }
}

/// Seconds by which a file may have been written after the commit was alive last, and before it began: a write may wait for its disk,
/// and clocks are set.
const GRACE: u64 = 60;

/// Refuse a file that somebody else has written since the commit into it was interrupted: it was restored, perhaps, and the log would
/// write old bytes into it.
fn refuse_written_since(opened: &OpenedFile, log: &Log<'_>, found: &Found) -> Result<(), Error> {
    let failed = |error: &io::Error| Error::io(&opened.path, ErrorCode::OpenFailed, "cannot be read", error);
    let header = log.header();
    let stat = fstat(opened.file.file()).map_err(|errno| failed(&errno.into()))?;
    let written = (u64::try_from(stat.st_mtime).unwrap_or(0), u32::try_from(stat.st_mtime_nsec).unwrap_or(0));
    let alive = log.last_alive();
    let why = if opened.block_device || written == header.changed {
        None
    } else if written.0 > alive.0.saturating_add(GRACE) {
        Some(format!("was written {} s after the commit into it had been interrupted", written.0 - alive.0))
    } else if written.0.saturating_add(GRACE) < header.begun.0 {
        Some("was last written before the commit into it began, and not when that says".to_owned())
    } else {
        None
    };
    let why = match why {
        Some(why) => why,
        None => match log.foreign(opened.file.file()).map_err(|error| failed(&error))? {
            Some(offset) => {
                format!("differs at offset {offset} from what it was, where the interrupted commit has changed nothing")
            }
            None => return Ok(()),
        },
    };
    let clause = format!(
        "{why}: it was restored or made anew, or another program wrote to it. If it is as it should be, remove the log: `rm {}`. If not, \
         restore it from a backup; --force gives it back what the log says nevertheless",
        shell_path(&found.path)
    );
    Err(Error::image(&opened.path, ErrorCode::RecoveryNeeded, clause))
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
    if stat.st_dev != of.st_dev && !opened.block_device {
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
