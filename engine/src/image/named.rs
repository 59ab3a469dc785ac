//! A file that the operator names. It is looked at once, before any image is read, and later either that very file is opened or
//! none.

use super::access::Access;
use super::failures::open_error;
use crate::error::Error;
use crate::escape::printable;
use crate::lookup::{walk, Directory, Identity};
use crate::nearest::nearest;
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, openat, FileType, Mode, OFlags, Stat};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A file that the operator names, and the result of looking at it.
#[derive(Debug)]
pub struct NamedFile {
    path: PathBuf,
    directory: Option<Directory>,
    name: OsString,
    found: Result<(OwnedFd, Stat), Errno>,
    near: Option<String>,
}

/// Names of a directory that are compared with one that does not exist.
const COMPARED: usize = 4096;

/// A path as the directory and the name in it; of a path that ends in a slash, the name does, too: it is a directory's.
fn split(path: &Path) -> (&Path, OsString) {
    let bytes = path.as_os_str().as_bytes();
    let end = bytes.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    let begin = bytes[..end].iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    let part = |range: std::ops::Range<usize>| OsStr::from_bytes(&bytes[range]);
    (Path::new(part(0..begin)), part(begin..bytes.len()).to_owned())
}

/// The name in a directory that is nearest to this one.
fn near(directory: &Directory, name: &OsStr) -> Option<String> {
    let entries = fs::read_dir(directory.path()).ok()?.take(COMPARED).flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    nearest(name.to_str()?, names.iter().map(String::as_str)).map(|name| printable(name).into_owned())
}

impl NamedFile {
    /// Look at the file that this path names.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        let (parent, name) = split(path);
        Self::look(path.to_owned(), Directory::open(parent), name)
    }

    /// Do the same for a path that begins at the directory of another image.
    #[must_use]
    pub fn beside(image: &Self, path: &Path) -> Self {
        let Some(directory) = image.directory.as_ref().filter(|_| path.is_relative()) else {
            return Self::new(path);
        };
        let (parent, name) = split(path);
        let shown = directory.path().join(path);
        Self::look(shown, directory.open_below(parent), name)
    }

    fn look(path: PathBuf, directory: Result<Directory, Errno>, name: OsString) -> Self {
        let (directory, found) = match directory {
            Err(errno) => (None, Err(errno)),
            Ok(directory) => {
                // The operator's own links are followed, those of procfs as well.
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let object = retry_on_intr(|| openat(&directory, &name, flags, Mode::empty()));
                let found = object.and_then(|object| fstat(&object).map(|stat| (object, stat)));
                (Some(directory), found)
            }
        };
        let missing = matches!(found, Err(Errno::NOENT));
        let near = directory.as_ref().filter(|_| missing).and_then(|directory| near(directory, &name));
        Self { path, directory, name, found, near }
    }

    /// Return the printable name in its directory that was probably meant, if the file does not exist.
    #[must_use]
    pub fn near(&self) -> Option<&str> {
        self.near.as_deref()
    }

    /// Return its path as the operator gave it, after the directory of another image if it begins there.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Return its name in its directory.
    #[must_use]
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Return the directory of its name, if that exists.
    #[must_use]
    pub fn directory(&self) -> Option<&Directory> {
        self.directory.as_ref()
    }

    /// Return its identity, if it exists.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        self.found.as_ref().ok().map(|(_, stat)| Identity::of(stat))
    }

    /// Return a descriptor that only names it, if it exists.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.found.as_ref().ok().map(|(object, _)| object.as_fd())
    }

    /// What it was when it was looked at.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn found(&self) -> Result<&Stat, Errno> {
        self.found.as_ref().map(|(_, stat)| stat).map_err(|errno| *errno)
    }

    /// Return the directory that holds the file itself, even if its name is a link.
    #[must_use]
    pub fn real_directory(&self) -> Option<Directory> {
        let top = Directory::open(Path::new("/")).ok()?;
        let reached = walk(self.directory.as_ref()?, &top, self.name.as_bytes()).ok()?;
        Some(reached.holder.directory().clone())
    }

    /// Claim it if it is a block device: as long as the descriptor is open, nobody can mount it or build something on it.
    ///
    /// # Errors
    /// [`ErrorCode::ImageInUse`] if somebody has done that, and what the system says otherwise.
    pub fn claim(&self) -> Result<Option<OwnedFd>, Error> {
        let Some(directory) = self.directory().filter(|_| self.is_block_device()) else { return Ok(None) };
        // Without O_CREAT, the kernel then refuses a device that has a claim (open(2)).
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        let claimed = retry_on_intr(|| openat(directory, self.name(), flags, Mode::empty()));
        let failed =
            |errno| open_error(&self.path, Access::ReadOnly, ErrorCode::ImageNotFound, &io::Error::from(errno));
        claimed.map(Some).map_err(failed)
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.found.as_ref().is_ok_and(|(_, stat)| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice)
    }

    /// The bytes that a file takes of its file system, if it is one.
    #[must_use]
    pub fn allocated(&self) -> Option<u64> {
        let (_, stat) = self.found.as_ref().ok()?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        regular.then(|| u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
    }

    /// The length of a file in bytes, if it is one.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        let (_, stat) = self.found.as_ref().ok()?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        regular.then(|| u64::try_from(stat.st_size).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_at_the_last_slash() {
        for (path, directory, name) in [
            ("top", "", "top"),
            ("./top", "./", "top"),
            ("/top", "/", "top"),
            ("a/b/top", "a/b/", "top"),
            ("a//top", "a//", "top"),
            ("a/top/", "a/", "top/"),
            ("/", "", "/"),
            ("..", "", ".."),
        ] {
            assert_eq!(split(Path::new(path)), (Path::new(directory), OsString::from(name)), "{path}");
        }
    }
}
