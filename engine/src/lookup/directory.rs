//! A directory as an open descriptor, which stays the same directory whatever happens to its name.

use rustix::fs::{fstat, openat, readlinkat, statat, AtFlags, FileType, Mode, OFlags, Stat, CWD};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// The identity of a file, independent of its names: device and inode; for a block device, its device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity(bool, u64, u64);

impl Identity {
    /// Identify a file by its inode and the device number of its file system.
    #[must_use]
    pub fn of_file(device: u64, inode: u64) -> Self {
        Self(false, device, inode)
    }

    /// Identify the block device with this number.
    #[must_use]
    pub fn of_device(number: u64) -> Self {
        Self(true, number, 0)
    }

    /// The inode, if it is a file's.
    #[must_use]
    pub fn inode(self) -> Option<u64> {
        (!self.0).then_some(self.2)
    }

    /// Identify a file by the result of `fstat`.
    #[must_use]
    pub fn of(stat: &Stat) -> Self {
        if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
            Self::of_device(stat.st_rdev)
        } else {
            Self::of_file(stat.st_dev, stat.st_ino)
        }
    }
}

/// A directory that is held open, and the path that people know it by.
#[derive(Clone, Debug)]
pub struct Directory {
    descriptor: Arc<OwnedFd>,
    identity: Identity,
    path: PathBuf,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The flags of a descriptor that only names a place.
const PLACE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

impl Directory {
    /// Open the directory that the operator names, following links on the way.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Self::open_from(CWD, path, std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
    }

    /// Do the same for a path that begins at this directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open_below(&self, path: &Path) -> Result<Self, Errno> {
        Self::open_from(self.as_fd(), path, self.path.join(path))
    }

    fn open_from(start: BorrowedFd<'_>, path: &Path, shown: PathBuf) -> Result<Self, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let descriptor = retry_on_intr(|| openat(start, path, PLACE | OFlags::DIRECTORY, Mode::empty()))?;
        let mut directory = Self::adopt(descriptor, shown)?;
        // Behind a link, `..` does not lead where the text seems to say.
        if directory.path.components().any(|component| component == Component::ParentDir) {
            directory.path = directory.real_path().unwrap_or(directory.path);
        }
        directory.path = directory.path.components().collect();
        Ok(directory)
    }

    /// Hold this descriptor of a directory.
    ///
    /// # Errors
    /// `ENOTDIR` if it is none.
    pub fn adopt(descriptor: OwnedFd, path: PathBuf) -> Result<Self, Errno> {
        let stat = fstat(&descriptor)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        Ok(Self { descriptor: Arc::new(descriptor), identity: Identity::of(&stat), path })
    }

    /// Return its identity.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Return an absolute path for messages, by which nothing is opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Return owner, mode and file system.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stat(&self) -> Result<Stat, Errno> {
        fstat(self)
    }

    /// Look at an entry without following a link and without opening it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn look(&self, name: &OsStr) -> Result<(OwnedFd, Stat), Errno> {
        let entry = retry_on_intr(|| openat(self, name, PLACE | OFlags::NOFOLLOW, Mode::empty()))?;
        let stat = fstat(&entry)?;
        Ok((entry, stat))
    }

    /// Return the identity of the file that has this name; of a link itself, if it is one.
    ///
    /// # Errors
    /// The kernel's; `ENOENT` if no file has the name.
    pub fn entry(&self, name: &OsStr) -> Result<Identity, Errno> {
        statat(self, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| Identity::of(&stat))
    }

    /// Open the subdirectory with this name, without following a link.
    ///
    /// # Errors
    /// The kernel's; `ENOTDIR` also for a link.
    pub fn enter(&self, name: &OsStr) -> Result<Self, Errno> {
        // With O_DIRECTORY, so that a file system that is mounted when somebody enters it is mounted.
        let flags = PLACE | OFlags::NOFOLLOW | OFlags::DIRECTORY;
        match retry_on_intr(|| openat(self, name, flags, Mode::empty())) {
            Ok(descriptor) => Self::adopt(descriptor, self.path.join(name)),
            // What some kernels say of a link.
            Err(Errno::LOOP) => Err(Errno::NOTDIR),
            Err(error) => Err(error),
        }
    }

    /// Return the present parent directory, under this one's path and `..`: to find out [where that is](Self::really) takes
    /// longer than to get there. The root directory is its own parent.
    ///
    /// # Errors
    /// The kernel's.
    pub fn parent(&self) -> Result<Self, Errno> {
        let flags = PLACE | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let above = retry_on_intr(|| openat(self, "..", flags, Mode::empty()))?;
        Self::adopt(above, self.path.join(".."))
    }

    /// The same directory under another path for people.
    #[must_use]
    pub(super) fn shown_as(mut self, path: PathBuf) -> Self {
        self.path = path;
        self
    }

    /// Replace its path by one without links, if that can be determined.
    #[must_use]
    pub fn really(mut self) -> Self {
        self.path = self.real_path().unwrap_or(self.path);
        self
    }

    /// Where the kernel says that it is, if that leads to it.
    fn real_path(&self) -> Option<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.descriptor.as_raw_fd());
        let path = PathBuf::from(OsString::from_vec(readlinkat(CWD, link, Vec::new()).ok()?.into_bytes()));
        let there = openat(CWD, &path, PLACE | OFlags::DIRECTORY, Mode::empty()).ok()?;
        (Identity::of(&fstat(&there).ok()?) == self.identity).then_some(path)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_stays_what_it_was() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/file"), "x").unwrap();
        let below = Directory::open(&dir.path().join("a/b")).unwrap();
        let identity = below.identity();
        std::fs::rename(dir.path().join("a/b"), dir.path().join("c")).unwrap();
        std::fs::create_dir(dir.path().join("a/b")).unwrap();
        assert!(below.look(OsStr::new("file")).is_ok());
        assert_eq!(below.parent().unwrap().identity(), Directory::open(dir.path()).unwrap().identity());
        assert_eq!(below.parent().unwrap().really().path(), dir.path().canonicalize().unwrap());
        assert_ne!(Directory::open(&dir.path().join("a/b")).unwrap().identity(), identity);
        std::fs::remove_file(dir.path().join("c/file")).unwrap();
        std::fs::remove_dir(dir.path().join("c")).unwrap();
        assert_eq!(below.look(OsStr::new("file")).unwrap_err(), Errno::NOENT);
    }

    #[test]
    fn links_are_not_entered() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        assert_eq!(directory.enter(OsStr::new("link")).unwrap_err(), Errno::NOTDIR);
        assert!(Directory::open(&dir.path().join("link")).is_ok());
    }
}
