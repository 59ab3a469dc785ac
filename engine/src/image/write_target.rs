//! Which files an image may make this program open.
//!
//! What an image records is decided on lexically, before the file system is touched: a plain path that stays
//! inside the directory of the image that names it, or inside a directory that the operator allowed. It is then
//! opened with `openat2` relative to that directory, so that no symbolic link and no race leaves it.

use crate::error::Error;
use crate::escape::escape_bytes;
use instar_guest_abi::ErrorCode;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Longest recorded name that is looked at, in bytes (`PATH_MAX`).
const MAX_NAME: usize = 4096;

/// The directories that recorded names may lead into, besides that of the image that records them.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    allowed: Vec<PathBuf>,
}

/// A file inside a directory, both decided on lexically.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The directory that it may not leave.
    root: PathBuf,
    /// The path below it: plain components only.
    below: PathBuf,
}

impl Located {
    /// The whole path, for people and for the directory of the image.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.root.join(&self.below)
    }

    /// Open the file without leaving the directory.
    ///
    /// # Errors
    /// `EXDEV` when a link leads outside; what opening gives otherwise.
    pub fn open(&self, flags: OFlags) -> io::Result<File> {
        let flags_of_root = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::io::retry_on_intr(|| rustix::fs::open(&self.root, flags_of_root, Mode::empty()))?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(&directory, &self.below, flags, Mode::empty(), resolve) {
                // A rename somewhere in the tree raced with the walk, or a signal with a slow file system.
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(file) => return Ok(File::from(file)),
            }
        }
    }
}

/// Why a recorded name is not followed: one clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotAllowed(pub String);

/// A path without `.` and `..`, or `None` if it climbs above its start.
fn normalise(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                if !plain.pop() {
                    return None;
                }
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    Some(plain)
}

/// Whether a relative path leaves its start on its way.
fn climbs(path: &Path) -> bool {
    path.is_relative() && normalise(path).is_none()
}

/// Whether a name begins with a protocol, as QEMU sees it: a colon before the first slash.
#[must_use]
pub fn is_protocol(name: &[u8]) -> bool {
    let end = name.iter().position(|&byte| byte == b'/').unwrap_or(name.len());
    name[..end].contains(&b':')
}

impl Gate {
    /// A gate that also lets names into these directories of the operator's.
    ///
    /// # Errors
    /// [`ErrorCode::WriteTargetNotAllowed`] for a directory that does not exist.
    pub fn new(allowed: &[PathBuf]) -> Result<Self, Error> {
        let mut all = Vec::new();
        for directory in allowed {
            let real = directory.canonicalize().map_err(|error| {
                let clause = format!("cannot be allowed as a directory: {error}");
                Error::image(directory, ErrorCode::WriteTargetNotAllowed, clause)
            })?;
            // A recorded name may spell the directory as the operator does, or as it really is.
            all.extend(std::path::absolute(directory).ok());
            all.push(real);
        }
        Ok(Self { allowed: all })
    }

    /// The same gate, that also lets names into this directory (an absolute path).
    #[must_use]
    pub fn with(&self, directory: &Path) -> Self {
        let mut allowed = self.allowed.clone();
        allowed.push(directory.to_owned());
        allowed.extend(directory.canonicalize().ok());
        Self { allowed }
    }

    /// The directories of the operator's, by every name that they have here.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.allowed.iter().map(PathBuf::as_path)
    }

    /// Decide where the first of these names leads that a file is found by; if none is, where the first one does.
    ///
    /// # Errors
    /// As [`Gate::locate`] for that one.
    pub fn locate_any<'n>(
        &self,
        directory: &Path,
        names: impl Iterator<Item = &'n [u8]>,
    ) -> Result<Located, NotAllowed> {
        let mut first = None;
        for name in names {
            match self.locate(directory, name) {
                Ok(located) if located.open(OFlags::PATH | OFlags::CLOEXEC).is_ok() => return Ok(located),
                other => first = first.or(Some(other)),
            }
        }
        first.unwrap_or_else(|| self.locate(directory, b""))
    }

    /// Decide where the name that an image in `directory` (an absolute path) records leads.
    ///
    /// # Errors
    /// [`NotAllowed`] when it is not followed.
    pub fn locate(&self, directory: &Path, name: &[u8]) -> Result<Located, NotAllowed> {
        let refused = |why: &str| Err(NotAllowed(format!("the recorded name '{}' {why}", escape_bytes(name))));
        if name.is_empty() {
            return refused("is empty");
        }
        if name.len() > MAX_NAME || name.contains(&0) {
            return refused("is no file name");
        }
        if is_protocol(name) {
            return refused("names a protocol, not a file");
        }
        let path = Path::new(OsStr::from_bytes(name));
        if path.file_name().is_none() || name.ends_with(b"/") {
            return refused("names a directory");
        }
        let real = directory.canonicalize().ok();
        let roots = || std::iter::once(directory).chain(real.as_deref());
        // Behind a link, `..` leads to the parent of the real directory: names that climb are resolved from that one.
        let start = if climbs(path) { real.as_deref().unwrap_or(directory) } else { directory };
        let whole = if path.is_absolute() { path.to_owned() } else { start.join(path) };
        let Some(whole) = normalise(&whole).map(|plain| Path::new("/").join(plain)) else {
            return refused("climbs above the root directory");
        };
        for root in roots().chain(self.allowed.iter().map(PathBuf::as_path)) {
            // The root itself is the operator's: its own links and dots are followed when it is opened.
            let Some(plain_root) = normalise(root).map(|plain| Path::new("/").join(plain)) else { continue };
            if let Ok(below) = whole.strip_prefix(&plain_root) {
                if !below.as_os_str().is_empty() {
                    return Ok(Located { root: root.to_owned(), below: below.to_owned() });
                }
            }
        }
        refused("leads outside the image's own directory")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn locate(directory: &str, name: &str, allowed: &[&str]) -> Result<PathBuf, String> {
        let gate = Gate { allowed: allowed.iter().map(PathBuf::from).collect() };
        gate.locate(Path::new(directory), name.as_bytes()).map(|located| located.path()).map_err(|error| error.0)
    }

    #[test]
    fn names_inside_the_directory() {
        for (name, path) in [
            ("base.qcow2", "/no/vm/base.qcow2"),
            ("./base.qcow2", "/no/vm/base.qcow2"),
            ("sub/base", "/no/vm/sub/base"),
            ("sub/../base", "/no/vm/base"),
            ("../vm/base", "/no/vm/base"),
            ("./a:b", "/no/vm/a:b"),
            ("/no/vm/base", "/no/vm/base"),
            ("/no/vm/x/../base", "/no/vm/base"),
            ("a b\n\u{1b}[31m", "/no/vm/a b\n\u{1b}[31m"),
        ] {
            assert_eq!(locate("/no/vm", name, &[]), Ok(PathBuf::from(path)), "{name}");
        }
    }

    #[test]
    fn names_that_are_not_followed() {
        for (name, why) in [
            ("", "empty"),
            ("../base", "outside"),
            ("sub/../../base", "outside"),
            ("/etc/passwd", "outside"),
            ("/no/vmx/base", "outside"),
            ("/no/vm/../base", "outside"),
            ("../../../../../base", "climbs"),
            ("nbd:localhost:10809", "protocol"),
            ("nbd://host/x", "protocol"),
            ("json:{\"driver\":\"qcow2\"}", "protocol"),
            ("file:base", "protocol"),
            ("a:b", "protocol"),
            ("..", "directory"),
            ("sub/", "directory"),
            ("/", "directory"),
            ("a\0b", "no file name"),
        ] {
            let error = locate("/no/vm", name, &[]).unwrap_err();
            assert!(error.contains(why), "{name}: {error}");
            assert!(!error.contains('\0') && !error.contains('\u{1b}'), "{error:?}");
        }
        assert!(locate("/no/vm", &"x".repeat(5000), &[]).is_err());
        // Of the image's own directory, not of its neighbour with the same beginning.
        assert!(locate("/no/vm", "/no/vm", &[]).is_err());
    }

    #[test]
    fn directories_that_the_operator_allows() {
        assert_eq!(locate("/no/vm", "../base/b", &["/no/base"]), Ok(PathBuf::from("/no/base/b")));
        assert_eq!(locate("/no/vm", "/no/base/x/b", &["/no/base"]), Ok(PathBuf::from("/no/base/x/b")));
        assert!(locate("/no/vm", "/no/base2/b", &["/no/base"]).is_err());
    }

    #[test]
    fn a_directory_behind_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for sub in ["data/vm", "data/images", "images"] {
            std::fs::create_dir_all(root.join(sub)).unwrap();
        }
        std::os::unix::fs::symlink("data/vm", root.join("link")).unwrap();
        let gate = Gate::new(&[root.join("images"), root.join("data/images")]).unwrap();
        let located = |name: &str| gate.locate(&root.join("link"), name.as_bytes()).map(|located| located.path());
        assert_eq!(located("../images/base"), Ok(root.join("data/images/base")));
        assert_eq!(located("base"), Ok(root.join("link/base")));
        for name in ["link/base", "data/vm/base"] {
            assert!(located(root.join(name).to_str().unwrap()).is_ok(), "{name}");
        }
        assert!(gate.with(&root.join("data")).locate(&root.join("link"), b"../base").is_ok());
    }

    #[test]
    fn links_do_not_lead_outside() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("in");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        std::fs::write(inside.join("base"), "y").unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("out")).unwrap();
        std::os::unix::fs::symlink("base", inside.join("link")).unwrap();
        let open = |name: &str| {
            let located = Gate::default().locate(&inside, name.as_bytes()).unwrap();
            located.open(OFlags::RDONLY | OFlags::CLOEXEC)
        };
        assert!(open("base").is_ok() && open("link").is_ok());
        assert_eq!(open("out").unwrap_err().raw_os_error(), Some(libc::EXDEV));
        assert_eq!(open("absent").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
