//! A clone of the target: it has no name, shares the target's extents, receives the commit, and takes the target's
//! place when it is complete.
//!
//! The order, and the crash that each step survives:
//!
//! 1. The clone is filled, and flushed. It has no name: a crash leaves nothing of it, and the target as it was;
//! 2. the old target gets the name of the backup, if there is to be one, and the directory is flushed. A crash leaves the target
//!    with two names. Then it [says](super::mark) what takes its place, and is flushed: that is believed only of a file that has
//!    taken it;
//! 3. the clone gets a temporary name and then, in one step, the target's; the directory is flushed. A crash leaves the old
//!    target or the new one, and before the rename perhaps a file with a temporary name;
//! 4. only then does anything change that counts on the new one: the overlay, its record of its parent, its children.

use super::mark;
use crate::create::{look_like, NewFile};
use crate::error::Error;
use crate::escape::escape_bytes;
use crate::image::{Access, OpenedFile};
use crate::lookup::{Directory, Identity};
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, ioctl_ficlone, linkat, unlinkat, AtFlags, CWD};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

/// The reason why a target cannot be cloned.
#[derive(Debug)]
pub enum NoClone {
    /// A reason to use an undo log instead, as one clause.
    Unable(String),
    /// The commit is refused.
    Refused(Error),
}

/// A clone on its way to the target's name.
#[derive(Debug)]
pub struct Clone {
    new: NewFile,
    /// The name that the old target keeps.
    backup: Option<OsString>,
    /// The backup that an interrupted run has made already; the present target took its place.
    made: Option<File>,
    /// The committed image, if there will be a backup.
    overlay: Option<File>,
    name: OsString,
    directory: Directory,
    identity: Identity,
}

/// The number of names that a file has, without that of a backup from an interrupted run.
fn other_names(file: &File, left_over: bool) -> u64 {
    fstat(file).map_or(1, |stat| stat.st_nlink).saturating_sub(u64::from(left_over))
}

/// What happens to the old target.
#[derive(Debug)]
pub struct Backup<'b> {
    /// The name that it keeps.
    pub name: &'b OsStr,
    /// The old target, which an earlier run has replaced.
    pub made: Option<File>,
    /// What is committed.
    pub overlay: &'b File,
}

impl Clone {
    /// Clone a target, and return an open file of the clone, locked as the target is. No other process can see the
    /// clone.
    ///
    /// # Errors
    /// [`NoClone`].
    pub fn begin(
        target: &OpenedFile,
        directory: &Directory,
        name: &OsStr,
        backup: Option<Backup<'_>>,
    ) -> Result<(Self, OpenedFile), NoClone> {
        let path = &target.path;
        let old = target.file.file();
        let unable =
            |what: &str, errno: Errno| NoClone::Unable(format!("{what}: {}", crate::error::reason(&errno.into())));
        let mut new = match NewFile::begin_replacing(path, directory, name, target.identity) {
            Ok(new) => new,
            Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => {
                let error = std::io::Error::from(errno);
                let what = "cannot be replaced, which --atomic needs: no file can be made in its directory";
                return Err(NoClone::Refused(Error::io(path, ErrorCode::OpenFailed, what, &error)));
            }
            Err(errno) => return Err(unable("no file without a name can be made", errno)),
        };
        // ioctl_ficlone(2): all of it or nothing.
        retry_on_intr(|| ioctl_ficlone(new.file(), old))
            .map_err(|errno| unable("its file system shares no extents", errno))?;
        look_like(old, new.file(), &[mark::NAME]).map_err(|why| NoClone::Unable(format!("a clone {why}")))?;
        let opened = new.open().and_then(|opened| {
            let begun_twice =
                || Error::new(ErrorCode::InternalOverflow, "a clone that was opened twice: please report this");
            opened.ok_or_else(begun_twice)?.lock_unnamed(Access::ReadWrite)
        });
        let opened = opened.map_err(NoClone::Refused)?;
        let duplicated = |file: &File| file.try_clone().map_err(|error| NoClone::Unable(error.to_string()));
        let overlay = backup.as_ref().map(|backup| duplicated(backup.overlay)).transpose()?;
        let (backup, made) = backup.map_or((None, None), |backup| (Some(backup.name.to_owned()), backup.made));
        let clone = Self {
            new,
            backup,
            made,
            overlay,
            name: name.to_owned(),
            directory: directory.clone(),
            identity: target.identity,
        };
        Ok((clone, opened))
    }

    /// Make the complete clone durable with everything that belongs to it, and put it in the place of `old`.
    ///
    /// # Errors
    /// An obstacle, with the target as it was; or a directory that cannot be flushed, with the new target complete.
    pub fn publish(&mut self, old: &OpenedFile) -> Result<(), Error> {
        let path = &old.path;
        let left_over = self.backup.as_deref().is_some_and(|backup| self.directory.entry(backup) == Ok(self.identity));
        let count = other_names(old.file.file(), left_over);
        if count > 1 {
            return Err(has_names(old, count));
        }
        let keeps = !left_over && self.made.is_none();
        if let Some(backup) = self.backup.as_deref().filter(|_| keeps) {
            self.keep(old, backup)?;
        }
        let marked = match &self.overlay {
            Some(overlay) => mark::set(self.marked(old), self.new.file(), overlay).map_err(|errno| {
                Error::io(path, ErrorCode::OpenFailed, "cannot be flushed, and so not be kept", &errno.into())
            }),
            None => Ok(()),
        };
        let published = match marked {
            Ok(()) => self.new.publish(true),
            Err(error) => Err(error),
        };
        if published.is_err() && keeps {
            // Only as long as the target still has its own name.
            if let Some(backup) =
                self.backup.as_deref().filter(|_| self.directory.entry(&self.name) == Ok(self.identity))
            {
                if self.directory.entry(backup) == Ok(self.identity) {
                    mark::remove(old.file.file());
                    let _ = unlinkat(&self.directory, backup, AtFlags::empty());
                }
            }
        }
        published.map_err(|error| error.at_path(path))
    }

    /// Whether the old target is to get another name, which it does not have yet.
    pub fn leaves_backup(&self) -> bool {
        self.backup.is_some() && self.made.is_none()
    }

    /// The file to which the backup's name leads.
    fn marked<'o>(&'o self, old: &'o OpenedFile) -> &'o File {
        self.made.as_ref().unwrap_or_else(|| old.file.file())
    }

    /// Remove the backup's mark: the commit has reached its end, and no second run needs it.
    pub fn finished(&self, old: &OpenedFile) {
        if let Some(overlay) = &self.overlay {
            // A run that changed nothing has left the target in its place.
            let target = if self.has_replaced(old) { self.new.file() } else { old.file.file() };
            mark::end(self.marked(old), target, overlay);
        }
    }

    /// Whether it has taken the place of `old`.
    pub fn has_replaced(&self, old: &OpenedFile) -> bool {
        fstat(self.new.file()).is_ok_and(|stat| stat.st_nlink > 0)
            && self.directory.entry(&self.name) != Ok(old.identity)
    }

    /// Give the old target the backup's name as well, durably.
    fn keep(&self, old: &OpenedFile, backup: &OsStr) -> Result<(), Error> {
        let failed = |errno: Errno| {
            let what = format!("cannot keep the name '{}' for what it was", escape_bytes(backup.as_bytes()));
            Error::io(&old.path, ErrorCode::OpenFailed, what, &errno.into())
        };
        let descriptor = format!("/proc/self/fd/{}", old.file.file().as_raw_fd());
        linkat(CWD, descriptor, &self.directory, backup, AtFlags::SYMLINK_FOLLOW).map_err(failed)?;
        self.new.flush_directory().map_err(|errno| {
            let _ = unlinkat(&self.directory, backup, AtFlags::empty());
            failed(errno)
        })
    }
}

/// The refusal of a file with several names.
pub(super) fn has_names(file: &OpenedFile, count: u64) -> Error {
    let clause = format!(
        "has {count} names (hard links), of which --atomic could replace one only: remove the others, which \
         `find -samefile` lists, or commit without --atomic"
    );
    Error::image(&file.path, ErrorCode::UnsupportedFormat, clause)
}
