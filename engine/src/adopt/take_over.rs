//! The step in which the overlay's file gets the target's name.

use super::mark;
use crate::error::{reason, Error, Role};
use crate::image::OpenedFile;
use crate::lookup::{removal_denied, Directory, Identity};
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, fsync, openat, renameat, Mode, OFlags};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// What the images are like when the last step fails.
const STATE: &str = "the overlay holds everything, and the target is as it was";

/// Both names, in the directory that holds them.
#[derive(Debug)]
pub struct TakeOver {
    directory: Directory,
    /// The same directory, to be flushed.
    flushed: OwnedFd,
    overlay: (OsString, Identity),
    target: (OsString, Identity),
    target_path: PathBuf,
}

impl TakeOver {
    /// Look at both names.
    ///
    /// # Errors
    /// What keeps one rename from doing it all: the names lie in two directories, or are not the only ones of their files.
    pub fn begin(overlay: &OpenedFile, target: &OpenedFile) -> Result<Self, Error> {
        let refused = |path: &Path, clause: String| {
            Err(Error::image(path, ErrorCode::UnsupportedFormat, format!("{clause}: commit without --by-adoption")))
        };
        let (directory, name) = overlay.place()?;
        let (beside, target_name) = target.place()?;
        if directory.identity() != beside.identity() {
            return refused(
                &target.path,
                "lies in another directory than the overlay, which could not take its name in one step".to_owned(),
            );
        }
        if overlay.name != name || overlay.holder.identity() != directory.identity() {
            let clause = "is a symbolic link, which would lead to nothing: name the file that it leads to";
            return Err(Error::image(&overlay.path, ErrorCode::OpenFailed, clause));
        }
        let (own, others) = (stat_of(overlay)?, stat_of(target)?);
        for (file, stat) in [(overlay, &own), (target, &others)] {
            if stat.st_nlink > 1 {
                let count = stat.st_nlink;
                return refused(&file.path, format!("has {count} names (hard links), of which only one would change"));
            }
        }
        let user = rustix::process::geteuid().as_raw();
        // Its mode is its owner's to change, and its owner root's.
        if user != 0 && (own.st_uid != user || (own.st_uid, own.st_gid) != (others.st_uid, others.st_gid)) {
            let clause =
                "has to belong to you, and to the same user and group as the target, as only root can change that";
            return refused(&overlay.path, clause.to_owned());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let flushed = retry_on_intr(|| openat(&directory, ".", flags, Mode::empty())).map_err(|errno| {
            let what = "cannot be replaced durably: its directory cannot be opened";
            Error::io(&target.path, ErrorCode::OpenFailed, what, &io::Error::from(errno))
        })?;
        for (file, stat) in [(overlay, &own), (target, &others)] {
            if let Some(why) = removal_denied(&flushed, stat) {
                let clause =
                    format!("may not be renamed or replaced in its directory by you, which --by-adoption needs: {why}");
                return Err(Error::image(&file.path, ErrorCode::PermissionDenied, clause));
            }
        }
        let target_path = target.path.clone();
        let (overlay, target) = ((name, overlay.identity), (target_name, target.identity));
        Ok(Self { directory, flushed, overlay, target, target_path })
    }

    /// The directory in which a name changes.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Give the overlay's file, which is complete and durable, the target's name. It is open and locked, as the target is.
    ///
    /// # Errors
    /// What the system says. The overlay holds everything then.
    pub fn complete(self, overlay: &File) -> Result<(), Error> {
        let failed = |clause: String, state: &str| {
            Error::image(&self.target_path, ErrorCode::BackingIo, clause).in_role(Role::Backing).in_state(state)
        };
        let cannot = |what: &str, errno: Errno| failed(format!("{what}: {}", why(errno)), STATE);
        retry_on_intr(|| fsync(overlay))
            .map_err(|errno| cannot("cannot be replaced: the overlay cannot be flushed", errno))?;
        for (name, identity) in [&self.overlay, &self.target] {
            if self.directory.entry(name) != Ok(*identity) {
                let clause = "is not replaced: another process has renamed or replaced one of the two images meanwhile";
                return Err(failed(clause.to_owned(), STATE));
            }
        }
        renameat(&self.directory, &self.overlay.0, &self.directory, &self.target.0)
            .map_err(|errno| cannot("cannot be replaced by the overlay", errno))?;
        let flushed = retry_on_intr(|| fsync(&self.flushed)).map_err(|errno| {
            let clause = format!(
                "is complete, but its directory cannot be flushed, so that a power loss may undo the renaming: {}",
                why(errno)
            );
            failed(clause, "the target is complete, and was the overlay")
        });
        if flushed.is_ok() {
            mark::remove(overlay);
        }
        flushed
    }
}

fn stat_of(file: &OpenedFile) -> Result<rustix::fs::Stat, Error> {
    fstat(file.file.file())
        .map_err(|errno| Error::io(&file.path, ErrorCode::OpenFailed, "cannot be looked at", &io::Error::from(errno)))
}

fn why(errno: Errno) -> String {
    reason(&io::Error::from(errno))
}
