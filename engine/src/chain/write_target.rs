//! The gate for names that images record.
//!
//! A commit writes into the file that the overlay names, and copies what deeper files hold into it. So a recorded name is
//! followed only if it is a plain path within the directory tree of the image that records it, or of one that the
//! operator allowed. That is decided by the text of the name; then the file is opened such that the kernel
//! refuses a way that leads out of that tree, whatever links there are, and whoever changes them meanwhile.

use super::directory::{lexical, ImageDirectory};
use crate::cli::escape::escape_bytes;
use crate::devices::{Access, ImageFile, OpenError};
use rustix::fs::{open, openat2, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Longest name in bytes (`PATH_MAX` of the kernel, with its terminator).
const NAME_MAX: usize = 4095;
/// How often an open is tried that lost a race against a rename.
const TRIES: usize = 64;

/// Why a recorded name is not followed. One clause; the caller names the image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameRefusal {
    /// There is no name.
    #[error("the recorded name is empty")]
    Empty,
    /// No file can have this name.
    #[error("the recorded name holds a NUL byte, which no file name does")]
    Nul,
    /// No file can have this name.
    #[error("the recorded name is {0} bytes long, longer than any path")]
    TooLong(usize),
    /// It is not the name of a file.
    #[error("the recorded name begins with the protocol '{0}:', and only files are committed into")]
    Protocol(String),
    /// It leads out of the directory tree.
    #[error("the recorded name leads out of the directory of the image that records it")]
    Outside,
    /// It names the directory itself.
    #[error("the recorded name is that of a directory")]
    Directory,
}

/// A name that may be followed: a directory, and a path within it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The directory that the path must not leave.
    pub root: PathBuf,
    /// The path within it.
    pub relative: PathBuf,
    /// The name for messages.
    pub shown: PathBuf,
}

/// The protocol that QEMU would see in a name: what is before a colon, if that comes before any slash.
#[must_use]
pub fn protocol_of(name: &[u8]) -> Option<String> {
    let end = name.iter().position(|&b| b == b':' || b == b'/')?;
    if name.get(end) == Some(&b':') {
        return Some(escape_bytes(&name[..end]));
    }
    None
}

/// Decide by its text whether a recorded name may be followed. `home` is the directory of the image that records it.
///
/// # Errors
/// [`NameRefusal`].
pub fn decide(home: &ImageDirectory, allowed: &[ImageDirectory], name: &[u8]) -> Result<Target, NameRefusal> {
    if name.is_empty() {
        return Err(NameRefusal::Empty);
    }
    if name.contains(&0) {
        return Err(NameRefusal::Nul);
    }
    if name.len() > NAME_MAX {
        return Err(NameRefusal::TooLong(name.len()));
    }
    if let Some(protocol) = protocol_of(name) {
        return Err(NameRefusal::Protocol(protocol));
    }
    let path = Path::new(OsStr::from_bytes(name));
    let shown = home.join(path);
    if name.ends_with(b"/") {
        return Err(NameRefusal::Directory);
    }
    if path.is_relative() {
        match depth(path) {
            // As it stands: the kernel resolves `..` behind links as the image's author meant it.
            Some(0) => return Err(NameRefusal::Directory),
            Some(_) => return Ok(Target { root: home.canonical().to_owned(), relative: path.to_owned(), shown }),
            None => {}
        }
    }
    // From the directory without links, `..` is what it looks like.
    let absolute = lexical(&home.canonical().join(path));
    for directory in std::iter::once(home).chain(allowed) {
        match directory.strip(&absolute) {
            Some(relative) if relative.as_os_str().is_empty() => return Err(NameRefusal::Directory),
            Some(relative) => return Ok(Target { root: directory.canonical().to_owned(), relative, shown }),
            None => {}
        }
    }
    Err(NameRefusal::Outside)
}

/// How deep below its start a relative path ends; `None` if it leaves it on its way.
fn depth(path: &Path) -> Option<usize> {
    let mut depth = 0usize;
    for component in path.components() {
        match component {
            Component::ParentDir => depth = depth.checked_sub(1)?,
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(depth)
}

/// Why a target could not be opened. One clause; the caller names the image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Following the name leads out of the tree.
    #[error("a link in the recorded name leads out of {0}")]
    LeadsOut(String),
    /// The kernel cannot keep the path within the tree.
    #[error("this kernel cannot keep a recorded name within a directory (openat2)")]
    Unsupported,
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Open a target such that the path does not leave its root.
///
/// # Errors
/// [`TargetError`].
pub fn open_beneath(target: &Target, access: Access) -> Result<ImageFile, TargetError> {
    let from = |errno| TargetError::Open(OpenError::from_errno(errno, access));
    let root = open(&target.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(from)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut tries = 0;
    loop {
        match openat2(&root, &target.relative, access.flags(), Mode::empty(), resolve) {
            Ok(fd) => return Ok(ImageFile::from_fd(fd, target.shown.clone(), access)?),
            Err(Errno::INTR | Errno::AGAIN) if tries < TRIES => tries += 1,
            Err(Errno::XDEV) => return Err(TargetError::LeadsOut(escape_bytes(target.root.as_os_str().as_bytes()))),
            Err(Errno::NOSYS) => return Err(TargetError::Unsupported),
            Err(errno) => return Err(from(errno)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn image(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, path.as_os_str().as_bytes()).unwrap();
    }

    #[test]
    fn names_are_decided_by_their_text() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for sub in ["vm/a", "images", "vm-other"] {
            std::fs::create_dir_all(root.join(sub)).unwrap();
        }
        let home = ImageDirectory::new(&root.join("vm")).unwrap();
        let allowed = [ImageDirectory::new(&root.join("images")).unwrap()];
        let inside = root.join("vm/x").into_os_string().into_encoded_bytes();
        let sibling = root.join("vm-other/x").into_os_string().into_encoded_bytes();
        let dotted = root.join("vm/../vm-other/x").into_os_string().into_encoded_bytes();
        let elsewhere = root.join("images/x").into_os_string().into_encoded_bytes();
        let long = vec![b'a'; 5000];
        let refused: &[(&[u8], NameRefusal)] = &[
            (b"", NameRefusal::Empty),
            (b"a\0b", NameRefusal::Nul),
            (&long, NameRefusal::TooLong(5000)),
            (b"nbd:localhost:10809", NameRefusal::Protocol("nbd".into())),
            (b"nbd+unix:///x?socket=y", NameRefusal::Protocol("nbd+unix".into())),
            (b"json:{}", NameRefusal::Protocol("json".into())),
            (b"file:x", NameRefusal::Protocol("file".into())),
            (b"file:///etc/passwd", NameRefusal::Protocol("file".into())),
            (b"FILE:x", NameRefusal::Protocol("FILE".into())),
            (b"a:b", NameRefusal::Protocol("a".into())),
            (b":x", NameRefusal::Protocol(String::new())),
            (b"\x1b[2J:x", NameRefusal::Protocol("\\x1b[2J".into())),
            (b"../x", NameRefusal::Outside),
            (b"..", NameRefusal::Outside),
            (b"a/../../x", NameRefusal::Outside),
            (b"/etc/passwd", NameRefusal::Outside),
            (b"//etc/passwd", NameRefusal::Outside),
            (b"/", NameRefusal::Directory),
            (b"/dev/kvm", NameRefusal::Outside),
            (b"/proc/self/fd/0", NameRefusal::Outside),
            (b".", NameRefusal::Directory),
            (b"a/..", NameRefusal::Directory),
            (b"a/", NameRefusal::Directory),
            (&sibling, NameRefusal::Outside),
            (&dotted, NameRefusal::Outside),
            (b"../vm-other/x", NameRefusal::Outside),
        ];
        for (name, refusal) in refused {
            assert_eq!(decide(&home, &allowed, name).as_ref(), Err(refusal), "{}", escape_bytes(name));
        }
        let taken: &[(&[u8], &str, &str)] = &[
            (b"x", "vm", "x"),
            (b"./x", "vm", "./x"),
            (b"./a:b", "vm", "./a:b"),
            (b"a/b:c", "vm", "a/b:c"),
            (b"a/../x", "vm", "a/../x"),
            (b"a//x", "vm", "a//x"),
            (b"new\nline \x1b[31m", "vm", "new\nline \x1b[31m"),
            (b"-dash", "vm", "-dash"),
            (&inside, "vm", "x"),
            (&elsewhere, "images", "x"),
            (b"../images/x", "images", "x"),
            (b"../vm/x", "vm", "x"),
        ];
        for (name, directory, relative) in taken {
            let target = decide(&home, &allowed, name).unwrap();
            assert_eq!((target.root, target.relative), (root.join(directory), PathBuf::from(relative)));
        }
        assert_eq!(decide(&home, &[], &elsewhere), Err(NameRefusal::Outside));
    }

    #[test]
    fn a_directory_has_all_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("real")).unwrap();
        symlink("real", root.join("link")).unwrap();
        let home = ImageDirectory::new(&root.join("link")).unwrap();
        for name in ["real/x", "link/x"] {
            let target = decide(&home, &[], root.join(name).as_os_str().as_bytes()).unwrap();
            assert_eq!((target.root, target.relative), (root.join("real"), PathBuf::from("x")));
        }
    }

    #[test]
    fn links_do_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        image(&root.join("vm/base"));
        image(&root.join("vm/sub/deep"));
        image(&root.join("secret"));
        let vm = root.join("vm");
        symlink("base", vm.join("inside")).unwrap();
        symlink("../secret", vm.join("up")).unwrap();
        symlink(root.join("secret"), vm.join("absolute")).unwrap();
        symlink("..", vm.join("parent")).unwrap();
        symlink("/proc/self/fd/0", vm.join("magic")).unwrap();
        symlink("loop", vm.join("loop")).unwrap();
        symlink("sub", vm.join("dir")).unwrap();
        let home = ImageDirectory::new(&vm).unwrap();
        let open = |name: &str| open_beneath(&decide(&home, &[], name.as_bytes()).unwrap(), Access::ReadWrite);
        for name in ["base", "./base", "inside", "sub/../base", "dir/deep", "dir/../base"] {
            assert!(open(name).is_ok(), "{name}: {:?}", open(name));
        }
        for name in ["up", "absolute", "parent/secret", "magic"] {
            assert!(matches!(open(name), Err(TargetError::LeadsOut(_))), "{name}: {:?}", open(name));
        }
        assert!(open("loop").is_err());
        assert!(matches!(open("missing"), Err(TargetError::Open(OpenError::NotFound))));
        assert!(matches!(open("sub"), Err(TargetError::Open(OpenError::NotAnImage("a directory")))));
        assert!(open(&"n".repeat(300)).is_err());
    }
}
