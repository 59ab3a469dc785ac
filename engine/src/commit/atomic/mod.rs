//! `--atomic`: whatever happens in between, the target has its old content or its new one.
//!
//! Where the file system shares extents, a [clone](clone) is filled, and takes the place of the target when it is complete.
//! Elsewhere the target is changed in place, with an [undo log](undo_log) beside it.

mod clone;
mod kept;
mod mark;
mod sources;
mod undo_log;

use super::changed::Changed;
use crate::devices::{Device, Devices};
use crate::error::Error;
use crate::escape::escape_bytes;
use crate::image::{undo_directory, ChainImage, OpenedFile};
use crate::lookup::{Directory, Identity};
use crate::recover::refuse_namesake;
use crate::sandbox::BadRequest;
use crate::undo::is_log_name;
pub(crate) use mark::NAME as REPLACED_MARK;

use clone::{has_names, Backup, Clone, NoClone};
use instar_guest_abi::{DeviceRole, ErrorCode, Phase, DEVICE_OUTPUT};
use rustix::fs::{fstat, openat, statat, AtFlags, FileType, Mode, OFlags};
use rustix::io::{retry_on_intr, Errno};
use serde::Serialize;
use sources::Sources;
use std::cell::RefCell;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::iter;
use std::mem;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use undo_log::{OfDevice, UndoLog};

/// The state of the files after a commit that did not reach its end, as one clause.
const AS_IT_WAS: &str = "the target is as it was, and the overlay reads as before";
/// The same, if the commit failed after the target was complete.
const COMPLETE: &str = "the target is complete and the overlay reads as before; running the commit again finishes it";

/// The way in which the old target is kept until the new one is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtomicWay {
    /// By committing into a clone, which takes its place.
    Clone,
    /// By a log beside it.
    UndoLog,
}

#[derive(Debug)]
enum Kept {
    /// The clone, and the target, locked to the end.
    Clone(Box<Clone>, Box<OpenedFile>),
    UndoLog(Rc<RefCell<UndoLog>>),
}

/// A commit that changes its target whole or not at all.
#[derive(Debug)]
pub struct Atomic {
    kept: Kept,
    /// The directory of the target.
    directory: Directory,
    /// Why the target is not cloned.
    why: Option<String>,
    /// The backup of a run that has ended, if there is one already.
    ended: Option<PathBuf>,
    /// Whether the guest has said that the target is complete; from then on, the target has its new content.
    complete: bool,
    /// The reason why the target could not be completed.
    failure: Option<Error>,
}

/// The name of a backup, if it is one.
///
/// # Errors
/// [`ErrorCode::BadUsage`].
fn backup_name(backup: &Path) -> Result<&OsStr, Error> {
    let name = backup.as_os_str();
    if name.is_empty() || name.as_bytes().contains(&b'/') || matches!(name.as_bytes(), b"." | b"..") {
        let clause = "--keep-backup takes a name in the directory of the target, without a slash";
        return Err(Error::new(ErrorCode::BadUsage, format!("'{}': {clause}", escape_bytes(name.as_bytes()))));
    }
    if is_log_name(name) {
        let clause =
            "is the name of an undo log, which makes every command refuse the image: give --keep-backup another name";
        return Err(Error::new(ErrorCode::BadUsage, format!("'{}' {clause}", escape_bytes(name.as_bytes()))));
    }
    Ok(name)
}

/// The file at the backup's name.
enum AtBackup {
    Nothing,
    /// The target, which has both names.
    Target,
    /// The old target, which an interrupted run has replaced.
    Replaced(File),
    /// What it was before a run that has reached its end, or nearly.
    Ended,
}

/// Refuse a backup of a name that exists, unless an interrupted run of the same commit has left it.
fn look_at_backup(
    target: &OpenedFile,
    (directory, name): (&Directory, &OsStr),
    backup: &OsStr,
    overlay: &File,
) -> Result<AtBackup, Error> {
    match statat(directory, backup, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(AtBackup::Nothing),
        Ok(stat) if Identity::of(&stat) == target.identity && backup != name => return Ok(AtBackup::Target),
        // It is looked at before it is opened: that of a device or FIFO can have an effect.
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink == 1 => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let opened = retry_on_intr(|| openat(directory, backup, flags, Mode::empty())).map(File::from);
            match opened {
                Ok(old) if mark::is_replaced(&old, target.file.file(), overlay) => return Ok(AtBackup::Replaced(old)),
                Ok(old) if mark::is_ended(&old, target.file.file(), overlay) => return Ok(AtBackup::Ended),
                _ => {}
            }
        }
        _ => {}
    }
    Err(backup_exists(&directory.path().join(backup)))
}

fn backup_exists(backup: &Path) -> Error {
    let clause = "exists, or cannot be looked at, and is not overwritten: if it is the backup of this commit, that has ended; if it is \
                  something else, give --keep-backup another name";
    Error::image(backup, ErrorCode::OpenFailed, clause)
}

impl Atomic {
    /// Prepare to keep a target, which gets what these images hold: the overlay comes first. If that takes a clone, the clone is the
    /// target's file from here on.
    ///
    /// # Errors
    /// One line that names the target and what to do.
    pub fn begin(
        target: &mut ChainImage<'_>,
        (overlay, between): (&ChainImage<'_>, &[ChainImage<'_>]),
        backup: Option<&Path>,
    ) -> Result<Self, Error> {
        let merged: Vec<&ChainImage<'_>> = iter::once(overlay).chain(between).collect();
        let path = target.opened.path.clone();
        let refused = |code, clause: &str| Err(Error::image(&path, code, clause));
        if target.opened.block_device && undo_directory().is_none() {
            return refused(
                ErrorCode::BadUsage,
                "is a block device, beside which no undo log can lie: name a directory on a disk for it with --undo-dir, or commit \
                 without --atomic",
            );
        }
        if target.opened.block_device && backup.is_some() {
            return refused(
                ErrorCode::BadUsage,
                "is a block device, which leaves no backup: take a copy or a snapshot of it, and leave out --keep-backup",
            );
        }
        if !target.files.is_empty() {
            return refused(
                ErrorCode::UnsupportedFormat,
                "is an image in several files, which cannot change all at once: commit without --atomic, or convert it to an \
                 image in one file first",
            );
        }
        let (directory, name) = target.opened.place()?;
        if target.opened.block_device {
            return Self::begin_on_device(&target.opened, (&directory, &name), Sources::of(&merged)?);
        }
        let backup = backup.map(backup_name).transpose()?;
        let overlay = overlay.opened.file.file();
        let found = match backup {
            Some(backup) => look_at_backup(&target.opened, (&directory, &name), backup, overlay)?,
            None => AtBackup::Nothing,
        };
        // Whether it is what this run would make, the plan says: a run that has nothing left to commit makes none.
        let ended = backup.filter(|_| matches!(found, AtBackup::Ended)).map(|name| directory.path().join(name));
        let backup = backup.filter(|_| ended.is_none());
        let left_over = matches!(found, AtBackup::Target);
        let made = if let AtBackup::Replaced(old) = found { Some(old) } else { None };
        let backup = backup.map(|name| Backup { name, made, overlay });
        let keeps = backup.is_some() || ended.is_some();
        let names = fstat(target.opened.file.file()).map_or(1, |stat| stat.st_nlink);
        if names.saturating_sub(u64::from(left_over)) > 1 {
            return Err(has_names(&target.opened, names));
        }
        let why = match Clone::begin(&target.opened, &directory, &name, backup) {
            Ok((clone, opened)) => {
                // All else that is known of the target stays true.
                let file = mem::replace(&mut target.opened.file, opened.file);
                let OpenedFile { identity, block_device, below, .. } = target.opened;
                let (path, beside) = (target.opened.path.clone(), target.opened.directory.clone());
                let old = OpenedFile {
                    file,
                    path,
                    directory: beside,
                    holder: directory.clone(),
                    name,
                    identity,
                    block_device,
                    below,
                };
                let kept = Self::kept(directory, Kept::Clone(Box::new(clone), Box::new(old)), None);
                return Ok(Self { ended, ..kept });
            }
            Err(NoClone::Refused(error)) => return Err(error),
            Err(NoClone::Unable(why)) => why,
        };
        if keeps {
            let clause = format!("cannot be cloned, and only a clone leaves a backup ({why}): leave out --keep-backup");
            return refused(ErrorCode::UnsupportedFormat, &clause);
        }
        let log = UndoLog::begin(&target.opened, (&directory, &name), None, Sources::of(&merged)?)?;
        Ok(Self::kept(directory, Kept::UndoLog(Rc::new(RefCell::new(log))), Some(why)))
    }

    /// Keep a block device by a log in the directory that the operator names for that.
    fn begin_on_device(target: &OpenedFile, at: (&Directory, &OsStr), sources: Sources) -> Result<Self, Error> {
        let nowhere = || Error::image(&target.path, ErrorCode::OpenFailed, "has no place for an undo log");
        let place = undo_directory().ok_or_else(nowhere)?;
        let identity = place.identify(target)?;
        let directory = place.directory().clone();
        let stat = [fstat(target.file.file()), directory.stat()];
        if let [Ok(device), Ok(beside)] = stat {
            if device.st_rdev == beside.st_dev {
                let clause = "is what the directory of --undo-dir lies on: name one on another disk";
                return Err(Error::image(&target.path, ErrorCode::BadUsage, clause));
            }
        }
        // A volume of that name may have been removed and made again: the operator has to know whose log it is.
        refuse_namesake(target, &place, &identity)?;
        let why = "a block device".to_owned();
        let of_device = OfDevice { directory: directory.clone(), identity };
        let log = UndoLog::begin(target, at, Some(of_device), sources)?;
        Ok(Self::kept(directory, Kept::UndoLog(Rc::new(RefCell::new(log))), Some(why)))
    }

    fn kept(directory: Directory, kept: Kept, why: Option<String>) -> Self {
        Self { kept, directory, why, ended: None, complete: false, failure: None }
    }

    /// Admit a commit of this many bytes. The backup of a run that has ended counts only for a run that commits nothing.
    ///
    /// # Errors
    /// The guest is ended: the backup exists.
    pub fn admit(&mut self, bytes: u64) -> Result<(), BadRequest> {
        match &self.ended {
            Some(backup) if bytes > 0 => {
                self.failure = Some(backup_exists(backup));
                Err(BadRequest("the backup exists".to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// Clean up after a commit that has reached its end.
    pub fn finished(&self) {
        if let Kept::Clone(clone, old) = &self.kept {
            clone.finished(old);
        }
    }

    /// Whether the target is a clone.
    #[must_use]
    pub fn is_clone(&self) -> bool {
        self.way() == AtomicWay::Clone
    }

    /// The way that was taken.
    #[must_use]
    pub fn way(&self) -> AtomicWay {
        match self.kept {
            Kept::Clone(..) => AtomicWay::Clone,
            Kept::UndoLog(_) => AtomicWay::UndoLog,
        }
    }

    /// The number of images and files of which an undo log says what they are.
    #[must_use]
    pub fn sources(&self) -> u64 {
        match &self.kept {
            Kept::Clone(..) => 0,
            Kept::UndoLog(log) => log.borrow().sources().into(),
        }
    }

    /// The directory in which names are made and removed.
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Make all changes to files that depend on the target wait for it, and all changes in place wait for the undo log.
    pub fn attend(&self, devices: &mut Devices) {
        devices.await_complete();
        if let Kept::UndoLog(log) = &self.kept {
            devices.ask_before_change(log.clone());
        }
    }

    /// Complete the target, on the guest's word: the files that depend on the target change next.
    ///
    /// # Errors
    /// The reason why the target is not complete, or cannot be completed. The host ends the guest then.
    pub fn complete(&mut self, devices: &mut Devices) -> Result<(), BadRequest> {
        if self.complete || self.failure.is_some() {
            return Err(BadRequest("a target was said to be complete twice".to_owned()));
        }
        if devices.phase() != Phase::Target {
            return Err(BadRequest("a target was said to be complete when it could not be".to_owned()));
        }
        if let Some(device) = devices.unflushed(|part| part == DeviceRole::Target) {
            return Err(BadRequest(format!(
                "the target was said to be complete while device {device} of it is not flushed"
            )));
        }
        devices.complete_target();
        let same = !devices.device(DEVICE_OUTPUT).is_some_and(Device::is_changed);
        let done = match &mut self.kept {
            // The old one is what it should be.
            Kept::Clone(clone, _) if same && !clone.leaves_backup() => Ok(()),
            Kept::Clone(clone, old) => clone.publish(old),
            Kept::UndoLog(log) => log.borrow_mut().complete(),
        };
        match done {
            Ok(()) => self.complete = true,
            Err(error) => {
                self.failure = Some(error);
                return Err(BadRequest("a target that cannot be made complete".to_owned()));
            }
        }
        Ok(())
    }

    /// Whether the target has its new content.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Restore the target, unless it is complete, and return the error of a commit that did not reach its end. `usual`
    /// makes the error for a state of the files, if the guest is to blame.
    pub fn error(mut self, changed: Changed, usual: impl Fn(&str) -> Error) -> Error {
        let (failure, state) = self.undo();
        let state = match changed {
            // What comes after the target is as without --atomic.
            Changed { overlay: true, .. } | Changed { children: true, .. } | Changed { backing: false, .. } => {
                changed.clause()
            }
            _ => &state,
        };
        match failure {
            Some(error) => error.in_state(state),
            None => usual(state),
        }
    }

    /// Restore the target, unless it is complete. Returns the reason why the host ended the guest, if it did, and the
    /// state of the files.
    fn undo(&mut self) -> (Option<Error>, String) {
        let failure = self.failure.take();
        let state = match &self.kept {
            _ if self.complete => COMPLETE.to_owned(),
            // Only its directory could not be flushed.
            Kept::Clone(clone, old) if failure.is_some() && clone.has_replaced(old) => COMPLETE.to_owned(),
            Kept::Clone(..) => AS_IT_WAS.to_owned(),
            Kept::UndoLog(log) => log.borrow_mut().undo(),
        };
        let failure = failure.or_else(|| match &self.kept {
            Kept::UndoLog(log) => log.borrow().failure(),
            Kept::Clone(..) => None,
        });
        (failure, state)
    }
}

impl fmt::Display for Atomic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.way(), &self.why) {
            (AtomicWay::Clone, _) => f.write_str("a clone takes its place"),
            (AtomicWay::UndoLog, Some(why)) => write!(f, "an undo log keeps what it was ({why})"),
            (AtomicWay::UndoLog, None) => f.write_str("an undo log keeps what it was"),
        }
    }
}
