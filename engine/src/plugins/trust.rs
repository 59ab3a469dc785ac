//! Checking who can have written a plugin library.
//!
//! A plugin is code that runs with the rights of the caller: it is taken only from a file, in a directory, that
//! nobody but root and the caller can change. The checks are made on opened descriptors, and the descriptor that
//! was checked is the one that is loaded: nothing is looked up by name twice.

use crate::error::{is_out_of_descriptors, reason};
use crate::lookup::{walk, Directory, Why};
use rustix::fs::{fstat, openat, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Write permission of group and others.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// The sticky bit: in such a directory only owners rename and remove.
const STICKY: u32 = 0o1000;

/// A directory that plugins may be loaded from.
#[derive(Debug)]
pub struct TrustedDirectory {
    directory: Directory,
    /// To list it.
    listing: OwnedFd,
}

/// Why nothing is loaded from a directory, or why a file is not loaded.
#[derive(Debug)]
pub struct Distrust {
    /// One clause.
    pub clause: String,
    /// No more files can be opened: this says nothing of the directory or the file.
    pub out_of_descriptors: bool,
}

impl From<String> for Distrust {
    fn from(clause: String) -> Self {
        Self { clause, out_of_descriptors: false }
    }
}

impl Distrust {
    /// What the kernel says, after what was tried.
    pub fn system(tried: impl fmt::Display, error: &io::Error) -> Self {
        let clause = format!("{tried}: {}", reason(error));
        Self { clause, out_of_descriptors: is_out_of_descriptors(error) }
    }
}

/// The same for what is tried, to map an error with.
fn cannot(tried: impl fmt::Display) -> impl FnOnce(Errno) -> Distrust {
    move |errno| Distrust::system(tried, &errno.into())
}

impl TrustedDirectory {
    /// Open a directory and check it and its ancestors. `Ok(None)` if it does not exist.
    pub fn open(path: &Path) -> Result<Option<Self>, Distrust> {
        match Directory::open(path) {
            Ok(directory) => Self::check(directory).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(cannot("cannot open the directory")(errno)),
        }
    }

    /// Check this directory and those above it: from its descriptor up, so that no name is looked up a second time.
    fn check(directory: Directory) -> Result<Self, Distrust> {
        let stat = directory.stat().map_err(cannot("cannot inspect the directory"))?;
        check(&stat, "the directory")?;
        let mut lower = directory.clone();
        loop {
            let where_it_is = |directory: &Directory| directory.clone().really().path().display().to_string();
            let lost = |errno| cannot(format!("cannot inspect the directory above {}", where_it_is(&lower)))(errno);
            let above = lower.parent().map_err(lost)?;
            if above.identity() == lower.identity() {
                break;
            }
            let stat = above.stat().map_err(lost)?;
            // A user who may rename within an ancestor can put another directory here.
            if stat.st_mode & 0o002 != 0 && stat.st_mode & STICKY == 0 {
                let clause = format!("the directory {} above it is writable by others", where_it_is(&above));
                return Err(clause.into());
            }
            lower = above;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let listing = openat(&directory, ".", flags, Mode::empty()).map_err(cannot("cannot open the directory"))?;
        Ok(Self { directory: directory.really(), listing })
    }

    /// The directory without links in its path.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Names of the directory's entries that `wanted` takes, sorted.
    pub fn names(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, Distrust> {
        let entries = rustix::fs::Dir::read_from(&self.listing).map_err(cannot("cannot list the directory"))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(cannot("cannot list the directory"))?;
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
        match self.open_plain(OsStr::new(name))? {
            Some(opened) => Ok(opened),
            None => self.follow(name),
        }
    }

    fn follow(&self, name: &str) -> Result<(File, Stat), Distrust> {
        let top = Directory::open(Path::new("/")).map_err(cannot("cannot follow the link"))?;
        let reached = walk(&self.directory, &top, name.as_bytes()).map_err(|lost| match lost.why {
            Why::Errno(errno) => cannot("cannot follow the link")(errno),
            Why::Directory => Distrust::from("it links to a directory".to_owned()),
            Why::Magic => Distrust::from("it links through /proc".to_owned()),
        })?;
        let holder = reached.holder.directory().clone();
        let unusable = || Distrust::from(format!("it links to {}, which cannot be opened", holder.path().display()));
        Self::check(holder.clone())?.open_plain(&reached.name)?.ok_or_else(unusable)
    }

    /// `Ok(None)` for a link.
    fn open_plain(&self, name: &OsStr) -> Result<Option<(File, Stat)>, Distrust> {
        // NONBLOCK: a FIFO must not hold the program up before its type is known.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = match openat(&self.directory, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(cannot("cannot open it")(errno)),
        };
        let stat = fstat(&fd).map_err(cannot("cannot inspect it"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Distrust::from("it is not a regular file".to_owned()));
        }
        check(&stat, "the file")?;
        Ok(Some((File::from(fd), stat)))
    }
}

/// Owner and mode.
fn check(stat: &Stat, what: &str) -> Result<(), Distrust> {
    if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
        return Err(format!("{what} belongs to another user (uid {})", stat.st_uid).into());
    }
    if stat.st_mode & WRITABLE_BY_OTHERS != 0 {
        let mode = stat.st_mode & 0o7777;
        return Err(format!("{what} is writable by others (mode {mode:04o}): chmod go-w").into());
    }
    Ok(())
}
