//! `--delete-overlay`: remove the overlay's file once nothing needs it.
//!
//! The order: the target is durable with all that was committed, and every child that is relinked with its new parent's name
//! (the devices see to that before a guest may succeed); then the name is removed; then the directory is flushed. A crash before
//! the last leaves the overlay under its name, with everything that it held or as a sound empty image, and the same command
//! removes it.
//!
//! The directory is open since before the first look at the image, and its entry is removed only if it still leads to
//! the committed file. Between that check and the removal, a user who may rename files in the directory can move
//! another file there, but only one whose name they could have removed themselves.

use super::request::CommitRequest;
use super::verdict::Parts;
use crate::devices::Cache;
use crate::error::{reason, Error, Role};
use crate::escape::escape_path;
use crate::image::NamedFile;
use crate::lookup::{removal_denied, Identity};
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, fsync, openat, statat, unlinkat, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The name to remove.
#[derive(Debug)]
pub struct Deletion {
    /// As the operator gave it, for messages.
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    /// The reason why this user may not remove the name, if one is known.
    denied: Option<String>,
    /// The identity of the file at the name, without following links.
    found: Stat,
}

impl Deletion {
    /// Look at the name and its directory, before the process is confined. `None` if there is no such file, which
    /// opening it reports.
    ///
    /// # Errors
    /// An obstacle to a durable removal.
    pub fn begin(named: &NamedFile) -> Option<Result<Self, Error>> {
        let directory = named.directory().filter(|_| named.identity().is_some())?;
        let path = named.path();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = retry_on_intr(|| openat(directory, ".", flags, Mode::empty()));
        let looked = opened.and_then(|directory| {
            let found = statat(&directory, named.name(), AtFlags::SYMLINK_NOFOLLOW)?;
            Ok((directory, found))
        });
        Some(looked.map_err(|errno| refused(path, &format!("cannot be removed durably: {}", why(errno)))).map(
            |(directory, found)| Self {
                path: path.to_owned(),
                denied: removal_denied(&directory, &found),
                directory,
                name: named.name().to_owned(),
                found,
            },
        ))
    }

    /// The directory that the name is in.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Refuse an overlay that cannot be removed, or whose removal would destroy more than the operator sees. In a dry
    /// run, a read-only directory is a warning, as a read-only image is. `warnings` takes further lines for the
    /// operator.
    ///
    /// # Errors
    /// The obstacle, and what to do about it.
    pub fn admit(
        &self,
        request: &CommitRequest,
        parts: &Parts<'_, '_>,
        warnings: &mut Vec<String>,
    ) -> Result<(), Error> {
        if request.keep_overlay {
            let message = "--delete-overlay removes the overlay, and -d keeps it: leave out the one or the other";
            return Err(Error::new(ErrorCode::BadUsage, message));
        }
        if request.cache == Cache::Unsafe {
            let message =
                "--delete-overlay removes what a power loss would need, and -t unsafe flushes nothing: use another mode";
            return Err(Error::new(ErrorCode::BadUsage, message));
        }
        let overlay = parts.overlay;
        if FileType::from_raw_mode(self.found.st_mode) == FileType::Symlink {
            return Err(refused(
                &self.path,
                "is a symbolic link: name the file that it leads to, which --delete-overlay removes",
            ));
        }
        if overlay.opened.block_device {
            return Err(refused(
                &self.path,
                "is a block device, of which nothing can be removed: leave out --delete-overlay",
            ));
        }
        if !overlay.files.is_empty() {
            let clause = format!(
                "is an image in {} files, which cannot be removed all at once: leave out --delete-overlay, and remove them \
                 when it is emptied",
                overlay.files.len() + 1
            );
            return Err(refused(&self.path, &clause));
        }
        if !overlay.facts.snapshots.is_empty() {
            let clause = format!(
                "has {} internal snapshots, which would be lost with it: delete them first, or leave out --delete-overlay",
                overlay.facts.snapshots.len()
            );
            return Err(refused(&self.path, &clause));
        }
        if Identity::of(&self.found) != overlay.opened.identity {
            return Err(refused(
                &self.path,
                "was replaced by another process while it was opened: run the command again",
            ));
        }
        if let Some(why) = &self.denied {
            let clause =
                format!("is a file that you may not remove from its directory, which --delete-overlay needs: {why}");
            if !request.only_plans() {
                return Err(Error::image(&self.path, ErrorCode::PermissionDenied, clause).in_role(Role::Overlay));
            }
            warnings.push(format!("'{}': {clause}", escape_path(&self.path)));
        }
        if self.found.st_nlink > 1 {
            warnings.push(format!(
                "'{}' has {} names (hard links): --delete-overlay removes this one, and the file stays with the others",
                escape_path(&self.path),
                self.found.st_nlink
            ));
        }
        Ok(())
    }

    /// Remove the name, durably, if it leads to this file.
    ///
    /// # Errors
    /// The system's error, or a name that leads to another file by now. The commit is done then.
    pub fn remove(&self, overlay: &File) -> Result<(), Error> {
        let failed = |clause: String| {
            Error::image(&self.path, ErrorCode::OverlayIo, clause).in_role(Role::Overlay).in_step("delete")
        };
        let own = fstat(overlay).map(|stat| Identity::of(&stat));
        let found = statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| Identity::of(&stat));
        if own.is_err() || own != found {
            return Err(failed(
                "is committed, and its name leads to another file by now, or to none: nothing was removed".to_owned(),
            ));
        }
        unlinkat(&self.directory, &self.name, AtFlags::empty()).map_err(|errno| {
            failed(format!("is committed, and cannot be removed: {}; remove it yourself", why(errno)))
        })?;
        // Until then a power loss may bring the name back: the overlay of before, whose content the target holds.
        retry_on_intr(|| fsync(&self.directory)).map_err(|errno| {
            failed(format!(
                "is committed and removed, but its directory cannot be flushed, so that a power loss may bring it back: {}",
                why(errno)
            ))
        })
    }
}

fn refused(path: &Path, clause: &str) -> Error {
    Error::image(path, ErrorCode::OpenFailed, clause).in_role(Role::Overlay)
}

fn why(errno: Errno) -> String {
    reason(&io::Error::from(errno))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;

    fn begun(path: &Path) -> (Deletion, File) {
        (Deletion::begin(&NamedFile::new(path)).unwrap().unwrap(), File::open(path).unwrap())
    }

    #[test]
    fn a_name_is_removed_only_if_it_leads_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, what) in [("top", "overlay"), ("other", "somebody else's")] {
            fs::write(path(name), what).unwrap();
        }
        fs::hard_link(path("top"), path("link")).unwrap();
        let (deletion, overlay) = begun(&path("top"));
        for swap in [
            |top: &Path, other: &Path| fs::hard_link(other, top),
            |top: &Path, other: &Path| std::os::unix::fs::symlink(other, top),
        ] {
            fs::remove_file(path("top")).unwrap();
            // Even a link that leads to the overlay is another name than the one that was looked at.
            swap(&path("top"), &path("other")).unwrap();
            let error = deletion.remove(&overlay).unwrap_err().to_string();
            assert!(error.contains("nothing was removed"), "{error}");
            assert!(path("other").exists() && fs::symlink_metadata(path("top")).is_ok());
        }
        fs::remove_file(path("top")).unwrap();
        assert!(deletion.remove(&overlay).is_err(), "it is gone, and its other name is not");
        fs::hard_link(path("link"), path("top")).unwrap();
        deletion.remove(&overlay).unwrap();
        assert!(!path("top").exists() && path("link").exists());
    }

    #[test]
    fn the_directory_is_the_one_that_was_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["one", "two"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("top"), name).unwrap();
        }
        let (deletion, overlay) = begun(&path("one/top"));
        fs::rename(path("one"), path("moved")).unwrap();
        fs::rename(path("two"), path("one")).unwrap();
        deletion.remove(&overlay).unwrap();
        assert!(path("one/top").exists() && !path("moved/top").exists());
        assert!(Deletion::begin(&NamedFile::new(&path("absent"))).is_none());
    }
}
