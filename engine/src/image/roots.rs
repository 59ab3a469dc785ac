//! The directories that recorded names may lead into. They are opened once, before any image is read, and known by their
//! descriptors from then on.
//!
//! Volume managers name block devices by links that leave their directory (`/dev/VG/LV -> ../dm-7`, and oVirt's links to
//! those). A block device to which a link in a root leads counts as lying in that root, if nobody but root and the caller can
//! change any of the links on the way. These devices are listed once as well, so that the kernel can hold this process to
//! them.

use super::access::Access;
use super::named::NamedFile;
use crate::confine::Reach;
use crate::error::{reason, Error};
use crate::lookup::{is_trusted, walk, Directory, Identity};
use instar_guest_abi::ErrorCode;
use rustix::fs::{openat, statat, AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Entries of a directory that are looked at for links to devices, at most.
const MAX_ENTRIES: usize = 1 << 16;
/// Entries of a directory that are looked at for a large file, at most.
const MAX_FILES: usize = 256;

/// A block device, and where it is.
#[derive(Clone, Debug)]
struct Device {
    identity: Identity,
    holder: Directory,
    name: OsString,
}

/// Directories that names may lead into.
#[derive(Clone, Debug)]
pub struct Roots {
    top: Directory,
    working: Option<Directory>,
    directories: Vec<Directory>,
    /// The directories above those, which everybody knows of.
    above: HashSet<Identity>,
    devices: Vec<Device>,
}

impl Roots {
    /// Make an empty set.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`] without a root directory.
    pub fn none() -> Result<Self, Error> {
        let root = Path::new("/");
        let top = Directory::open(root)
            .map_err(|errno| Error::io(root, ErrorCode::OpenFailed, "cannot be opened", &errno.into()))?;
        // If the working directory is gone, no name can begin there.
        let working = Directory::open(Path::new(".")).ok();
        Ok(Self { top, working, directories: Vec::new(), above: HashSet::new(), devices: Vec::new() })
    }

    /// Open the directory of the image that the operator names, and the directories that the operator allows.
    ///
    /// # Errors
    /// [`ErrorCode::WriteTargetNotAllowed`] for a directory that does not exist.
    pub fn of(image: &NamedFile, allowed: &[PathBuf]) -> Result<Self, Error> {
        let mut roots = Self::none()?;
        let devices = image.is_block_device();
        if let Some(directory) = image.directory() {
            roots.add(directory.clone(), devices);
        }
        for path in allowed {
            let directory = Directory::open(path).map_err(|errno| {
                let why = match errno {
                    Errno::NOENT => "the directory does not exist".to_owned(),
                    _ => format!("cannot open the directory: {}", reason(&errno.into())),
                };
                Error::image(path, ErrorCode::WriteTargetNotAllowed, format!("no backing is allowed in it: {why}"))
            })?;
            roots.add(directory, true);
        }
        Ok(roots)
    }

    /// Make a set of one directory.
    ///
    /// # Errors
    /// As [`Roots::none`].
    pub fn at(directory: &Directory) -> Result<Self, Error> {
        let mut roots = Self::none()?;
        roots.add(directory.clone(), false);
        Ok(roots)
    }

    /// Add the directory of another file that the operator names.
    #[must_use]
    pub fn and(&self, image: &NamedFile) -> Self {
        let mut roots = self.clone();
        if let Some(directory) = image.directory() {
            roots.add(directory.clone(), image.is_block_device());
        }
        roots
    }

    fn add(&mut self, directory: Directory, devices: bool) {
        if self.contains(directory.identity()) {
            return;
        }
        let mut above = directory.clone();
        // Without the permission to go up, what is above stays unknown.
        while let Ok(parent) = above.parent() {
            if parent.identity() == above.identity() {
                break;
            }
            self.above.insert(parent.identity());
            above = parent;
        }
        if devices || is_for_devices(&directory) {
            self.devices.extend(linked_devices(&directory, &self.top));
        }
        self.directories.push(directory);
    }

    /// Return the root directory of this process.
    #[must_use]
    pub fn top(&self) -> &Directory {
        &self.top
    }

    /// Return the working directory, if it exists.
    #[must_use]
    pub fn working_directory(&self) -> Option<&Directory> {
        self.working.as_ref()
    }

    /// Return the directories.
    #[must_use]
    pub fn directories(&self) -> &[Directory] {
        &self.directories
    }

    /// Whether this is one of the directories.
    #[must_use]
    pub fn contains(&self, directory: Identity) -> bool {
        self.directories.iter().any(|root| root.identity() == directory)
    }

    /// Whether this directory is above one of them.
    #[must_use]
    pub fn is_above(&self, directory: Identity) -> bool {
        self.above.contains(&directory)
    }

    /// Whether a link in one of them leads to this block device.
    #[must_use]
    pub fn has_device(&self, device: Identity) -> bool {
        self.devices.iter().any(|known| known.identity == device)
    }

    /// Whether a plain file in one of them takes `bytes` of its file system, as far as a short look says: it is one that an image
    /// may name. Nothing is opened or read.
    pub(crate) fn hold_file_of(&self, bytes: u64) -> bool {
        self.directories.iter().any(|directory| {
            let entries = list(directory).into_iter().flatten().flatten().take(MAX_FILES);
            let names = entries.filter(|entry| matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown));
            let mut stats =
                names.filter_map(|entry| statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).ok());
            stats.any(|stat| {
                let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
                regular && u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512) >= bytes
            })
        })
    }

    /// Return the files in them that may be opened, for the kernel to enforce.
    #[must_use]
    pub fn reach(&self, access: Access) -> Reach<'_> {
        self.add_to(Reach::default(), access)
    }

    /// Add the same to an existing reach.
    #[must_use]
    pub fn add_to<'r>(&'r self, reach: Reach<'r>, access: Access) -> Reach<'r> {
        let write = access == Access::ReadWrite;
        let reach = self.directories.iter().fold(reach, |reach, root| reach.add(root, write));
        self.devices.iter().fold(reach, |reach, device| reach.add_entry(&device.holder, &device.name, write))
    }
}

/// Whether a directory is on the file system of `/dev`.
fn is_for_devices(directory: &Directory) -> bool {
    let device = |stat: rustix::fs::Stat| stat.st_dev;
    let of = directory.stat().map(device);
    of.is_ok() && of == rustix::fs::stat("/dev").map(device)
}

/// The entries of a directory, if they may be read.
fn list(directory: &Directory) -> Option<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(directory, ".", flags, Mode::empty()).and_then(Dir::new).ok()
}

/// The block devices to which links in a directory lead, where only root and the caller can have made them.
fn linked_devices(directory: &Directory, top: &Directory) -> Vec<Device> {
    let mut devices: Vec<Device> = Vec::new();
    let Some(entries) = list(directory) else { return devices };
    if !is_trusted(directory) {
        return devices;
    }
    for entry in entries.flatten().take(MAX_ENTRIES) {
        if !matches!(entry.file_type(), FileType::Symlink | FileType::Unknown) {
            continue;
        }
        let Ok(reached) = walk(directory, top, entry.file_name().to_bytes()) else { continue };
        let identity = Identity::of(&reached.stat);
        let is_device = FileType::from_raw_mode(reached.stat.st_mode) == FileType::BlockDevice;
        if !is_device || !reached.trusted || devices.iter().any(|known| known.identity == identity) {
            continue;
        }
        // Most lie in one directory: it is held once.
        let holder = reached.holder.directory();
        let same = devices.iter().find(|known| known.holder.identity() == holder.identity());
        let holder = same.map_or_else(|| holder.clone(), |known| known.holder.clone());
        devices.push(Device { identity, holder, name: reached.name });
    }
    devices
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn directories_are_known_by_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("images")).unwrap();
        std::fs::create_dir_all(dir.path().join("store")).unwrap();
        std::os::unix::fs::symlink("store", dir.path().join("link")).unwrap();
        let image = NamedFile::new(&dir.path().join("images/top"));
        let roots = Roots::of(&image, &[dir.path().join("link")]).unwrap();
        let identity = |name: &str| Directory::open(&dir.path().join(name)).unwrap().identity();
        assert!(roots.contains(identity("images")) && roots.contains(identity("store")));
        assert!(!roots.contains(identity(".")) && roots.is_above(identity(".")));
        assert!(Roots::of(&image, &[dir.path().join("absent")]).is_err());
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(Roots::of(&image, &[dir.path().join("file")]).is_err());
    }

    #[test]
    fn names_of_directories_are_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join(OsStr::from_bytes(b"\xff\xfe\n"));
        std::fs::create_dir(&odd).unwrap();
        assert!(Roots::of(&NamedFile::new(&odd.join("x")), &[odd]).is_ok());
    }
}
