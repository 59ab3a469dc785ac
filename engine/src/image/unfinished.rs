//! The undo log that an interrupted `instar commit --atomic` leaves beside its target. Until the target is restored, it is a
//! mixture of two images, which nobody may read or change.

use super::access::Access;
use super::gate::Located;
use super::named::NamedFile;
use super::names::file_name;
use super::open::OpenedFile;
use super::undo_directory::undo_directory;
use crate::error::Error;
use crate::escape::shell_path;
use crate::lookup::{walk, Directory, Why};
use crate::undo::log_name;
use instar_guest_abi::ErrorCode;
use rustix::fs::{statat, AtFlags, FileType};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Where a file is that was opened by a name.
enum Whereabouts {
    /// In this directory, under this name.
    Here(Directory, OsString),
    /// Somewhere else: the name leads to another file, or to none.
    Elsewhere,
    /// The name is one that the kernel makes up, such as `/dev/fd/3`.
    Nowhere,
}

impl OpenedFile {
    fn whereabouts(&self) -> Whereabouts {
        let is_it = |directory: &Directory, name: &OsStr| directory.entry(name) == Ok(self.identity);
        if is_it(&self.holder, &self.name) {
            return Whereabouts::Here(self.holder.clone(), self.name.clone());
        }
        let Ok(top) = Directory::open(Path::new("/")) else { return Whereabouts::Elsewhere };
        match walk(&self.holder, &top, self.name.as_bytes()) {
            Ok(reached) if is_it(reached.holder.directory(), &reached.name) => {
                Whereabouts::Here(reached.holder.directory().clone(), reached.name)
            }
            Err(lost) if matches!(lost.why, Why::Magic) => Whereabouts::Nowhere,
            Ok(_) | Err(_) => Whereabouts::Elsewhere,
        }
    }

    fn moved(&self) -> Error {
        let clause = "was moved or replaced by another process meanwhile: run the command again";
        Error::image(&self.path, ErrorCode::OpenFailed, clause)
    }

    /// Return the directory that holds the file itself, and its name there, not those of a link to it.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`] if its name leads to another file meanwhile.
    pub fn place(&self) -> Result<(Directory, OsString), Error> {
        match self.whereabouts() {
            Whereabouts::Here(directory, name) => Ok((directory, name)),
            Whereabouts::Elsewhere | Whereabouts::Nowhere => Err(self.moved()),
        }
    }

    /// Refuse a file with an undo log beside it.
    ///
    /// # Errors
    /// [`ErrorCode::RecoveryNeeded`], and [`ErrorCode::OpenFailed`] if its name leads to another file meanwhile.
    pub(super) fn refuse_unfinished(&self) -> Result<(), Error> {
        if self.block_device {
            return self.refuse_unfinished_device();
        }
        // What an atomic commit has replaced, or somebody has moved, while this process waited for its lock is not the image any
        // more: whatever is written into it would be lost.
        let (directory, name) = match self.whereabouts() {
            Whereabouts::Here(directory, name) => (directory, name),
            Whereabouts::Elsewhere => return Err(self.moved()),
            // Nobody can find a log of it.
            Whereabouts::Nowhere => return Ok(()),
        };
        match unfinished(&directory, &name, &self.path) {
            Some(clause) => Err(Error::image(&self.path, ErrorCode::RecoveryNeeded, clause)),
            None => Ok(()),
        }
    }
}

impl OpenedFile {
    /// Refuse a block device with an undo log in the directory of those, if the operator or the configuration names one.
    fn refuse_unfinished_device(&self) -> Result<(), Error> {
        let Some(place) = undo_directory() else { return Ok(()) };
        // A device without an identity has no log.
        let Ok(identity) = place.identify(self) else { return Ok(()) };
        let name = identity.log_name();
        match statat(place.directory(), &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            Ok(_) | Err(_) => {
                let (directory, log) = (place.directory().path(), place.directory().path().join(&name));
                let clause = format!(
                    "has an undo log, {}: an atomic commit into it did not end, and if none is running, `instar recover --undo-dir {} {}` \
                     gives it back what it was; if it was restored or made anew since, remove the log instead: `rm {}`",
                    shell_path(&log),
                    shell_path(directory),
                    shell_path(&self.path),
                    shell_path(&log)
                );
                Err(Error::image(&self.path, ErrorCode::RecoveryNeeded, clause))
            }
        }
    }
}

/// What is said of the file of this name, at `path` for people, if it has an undo log beside it: one clause.
fn unfinished(directory: &Directory, name: &OsStr, path: &Path) -> Option<String> {
    match statat(directory, log_name(name), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT | Errno::NAMETOOLONG) => None,
        // A log that cannot be looked at is one.
        Ok(_) | Err(_) => Some(clause(path, &directory.path().join(log_name(name)))),
    }
}

/// What is said of a file with a log.
fn clause(path: &Path, log: &Path) -> String {
    format!(
        "has an undo log beside it: an atomic commit into it did not end, and if none is running, `instar recover {}` gives it \
         back what it was; if it was restored or made anew since, remove the log instead: `rm {}`",
        shell_path(path),
        shell_path(log)
    )
}

impl Located {
    /// Refuse a file with an undo log beside it, which is not opened for that.
    ///
    /// # Errors
    /// [`ErrorCode::RecoveryNeeded`].
    pub(super) fn refuse_unfinished(&self) -> Result<(), Error> {
        let file = FileType::from_raw_mode(self.reached.stat.st_mode) == FileType::RegularFile;
        match unfinished(self.reached.holder.directory(), &self.reached.name, &self.path).filter(|_| file) {
            Some(clause) => Err(Error::image(&self.path, ErrorCode::RecoveryNeeded, clause)),
            None => Ok(()),
        }
    }
}

/// What is said of the file that an image in a directory names, at `path` for people, if that has an undo log beside it: one
/// clause. Nothing is opened, and a link is not followed.
#[must_use]
pub fn unfinished_below(directory: &Directory, name: &[u8], path: &Path) -> Option<String> {
    let file = file_name(name).ok().filter(|file| !file.from_working_directory)?;
    let named = Path::new(OsStr::from_bytes(&file.path));
    let log = named.with_file_name(log_name(named.file_name()?));
    statat(directory, &log, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(clause(path, &directory.path().join(log)))
}

impl NamedFile {
    /// Refuse to overwrite a file with an undo log beside it, which would be applied to the new content. A file that cannot be
    /// examined is left to the writer to report.
    ///
    /// # Errors
    /// [`ErrorCode::RecoveryNeeded`].
    pub fn refuse_unfinished(&self) -> Result<(), Error> {
        match self.identity().map(|_| self.open(Access::Shared, ErrorCode::ImageNotFound)) {
            Some(Err(error)) if error.code == ErrorCode::RecoveryNeeded => Err(error),
            _ => Ok(()),
        }
    }
}
