//! Who may have put a plugin library where it is.
//!
//! A plugin is code that runs with the rights of the caller: it is taken only from a file, in a directory, that
//! nobody but root and the caller can change. The checks are made on opened descriptors, and the descriptor that
//! was checked is the one that is loaded: nothing is looked up by name twice.

use rustix::fs::{fstat, open, openat, FileType, Mode, OFlags, Stat};
use rustix::process::geteuid;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Write permission of group and others.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// The sticky bit: in such a directory only owners rename and remove.
const STICKY: u32 = 0o1000;

/// A directory that plugins may be loaded from.
#[derive(Debug)]
pub struct TrustedDirectory {
    path: PathBuf,
    fd: OwnedFd,
}

/// Why nothing is loaded from a directory, or why a file is not loaded. One clause.
pub type Distrust = String;

impl TrustedDirectory {
    /// Open a directory and check it and its ancestors. `Ok(None)` if it does not exist.
    pub fn open(path: &Path) -> Result<Option<Self>, Distrust> {
        let path = match path.canonicalize() {
            Ok(path) => path,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("cannot open the directory: {error}")),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(&path, flags, Mode::empty()).map_err(|e| format!("cannot open the directory: {e}"))?;
        let stat = fstat(&fd).map_err(|e| format!("cannot inspect the directory: {e}"))?;
        check(&stat, "the directory")?;
        for ancestor in path.ancestors().skip(1) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = open(ancestor, flags, Mode::empty())
                .map_err(|e| format!("cannot inspect the directory {}: {e}", ancestor.display()))?;
            let stat = fstat(&fd).map_err(|e| format!("cannot inspect the directory {}: {e}", ancestor.display()))?;
            // Whoever may rename within an ancestor can put another directory here.
            if stat.st_mode & 0o002 != 0 && stat.st_mode & STICKY == 0 {
                return Err(format!("the directory {} above it is writable by others", ancestor.display()));
            }
        }
        Ok(Some(Self { path, fd }))
    }

    /// The directory without links in its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the directory's entries that `wanted` takes, sorted.
    pub fn names(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, Distrust> {
        let entries = rustix::fs::Dir::read_from(&self.fd).map_err(|e| format!("cannot list the directory: {e}"))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| format!("cannot list the directory: {e}"))?;
            if let Ok(name) = entry.file_name().to_str() {
                if wanted(name) {
                    names.push(name.to_owned());
                }
            }
        }
        names.sort();
        Ok(names)
    }

    /// Open a file of the directory for reading and check it. A link is followed to where it leads, whose directory is
    /// then checked like this one.
    pub fn open_file(&self, name: &str) -> Result<(File, Stat), Distrust> {
        match self.open_plain(name)? {
            Some(opened) => Ok(opened),
            None => self.follow(name),
        }
    }

    fn follow(&self, name: &str) -> Result<(File, Stat), Distrust> {
        let target = self.path.join(name).canonicalize().map_err(|e| format!("cannot follow the link: {e}"))?;
        let unusable = || format!("it links to {}, which cannot be opened", target.display());
        let directory = Self::open(target.parent().ok_or_else(unusable)?)?.ok_or_else(unusable)?;
        let name = target.file_name().and_then(|name| name.to_str()).ok_or_else(unusable)?;
        directory.open_plain(name)?.ok_or_else(unusable)
    }

    /// `Ok(None)` for a link.
    fn open_plain(&self, name: &str) -> Result<Option<(File, Stat)>, Distrust> {
        // NONBLOCK: a FIFO must not hold the program up before its type is known.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::LOOP) => return Ok(None),
            Err(error) => return Err(format!("cannot open it: {error}")),
        };
        let stat = fstat(&fd).map_err(|e| format!("cannot inspect it: {e}"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("it is not a regular file".to_owned());
        }
        check(&stat, "the file")?;
        Ok(Some((File::from(fd), stat)))
    }
}

/// Owner and mode.
fn check(stat: &Stat, what: &str) -> Result<(), Distrust> {
    if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
        return Err(format!("{what} belongs to another user (uid {})", stat.st_uid));
    }
    if stat.st_mode & WRITABLE_BY_OTHERS != 0 {
        return Err(format!("{what} is writable by others (mode {:04o}): chmod go-w", stat.st_mode & 0o7777));
    }
    Ok(())
}
