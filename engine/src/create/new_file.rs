//! A file that appears under its name only when it is complete. Until then it has no name or, on file systems that do not
//! support that, a temporary one beside the final name.
//!
//! Before [`NewFile::publish`], an existing file of that name does not change, whatever happens. A crash leaves nothing of a
//! file without a name. A file with a temporary name is removed when the operation fails or is interrupted; a power loss or a
//! `SIGKILL` leaves it behind.

use super::file::lock;
use crate::error::{reason, Error};
use crate::image::{Access, NamedFile, OpenedFile};
use crate::lookup::{Directory, Identity};
use crate::plugins::FileImage;
use instar_guest_abi::ErrorCode;
use rustix::fs::{
    fchmod, fchown, fstat, fsync, linkat, openat, renameat, renameat_with, unlinkat, AtFlags, Mode, OFlags,
    RenameFlags, CWD,
};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Names that are tried for a file that has to have one.
const ATTEMPTS: u32 = 100;

/// The file that stands at the name already.
#[derive(Debug)]
struct Replaced {
    identity: Identity,
    /// Open for writing, so that it can be locked.
    file: Option<File>,
}

/// A file that has not got its name yet.
#[derive(Debug)]
pub struct NewFile {
    /// As the operator gave it, for messages.
    path: PathBuf,
    /// The directory that the name lies in: once to name it, once to flush it.
    directory: Directory,
    flushed: OwnedFd,
    name: OsString,
    /// The file twice: for the image, and for its name.
    image: Option<File>,
    file: File,
    /// The name that it has meanwhile, if it has one.
    temporary: Option<OsString>,
    replaced: Option<Replaced>,
    published: bool,
}

fn failed(path: &Path, what: &str, errno: Errno) -> Error {
    Error::io(path, ErrorCode::OpenFailed, what, &io::Error::from(errno))
}

/// The parts of an image are not written in their order.
const NO_PIPE: &str = "is not a regular file: an image is written to a file, and not to a pipe or a terminal";

impl NewFile {
    /// Make a file for the image that `path` will name. An existing file is not changed, but opened so that it can be
    /// [locked](Self::lock_replaced); the new file gets its mode, and its owner where possible.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`] for what is no regular file, and what the system says.
    pub fn begin(path: &Path) -> Result<Self, Error> {
        let refused = |clause: &str| Err(Error::image(path, ErrorCode::OpenFailed, clause));
        // The file that a link leads to is what is replaced.
        let is_link = std::fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
        let real = if is_link { std::fs::canonicalize(path) } else { Ok(path.to_owned()) };
        let Ok(real) = real else {
            if std::fs::metadata(path).is_ok() {
                return refused(NO_PIPE);
            }
            return refused("is a link that leads to no file: remove it, or name the file that is to be made");
        };
        let named = NamedFile::new(&real);
        let Some(directory) = named.directory() else {
            return refused("cannot be created: its directory does not exist");
        };
        if named.identity().is_some() && named.length().is_none() || named.name().is_empty() {
            return refused(NO_PIPE);
        }
        let cannot = |errno| failed(path, "cannot be created", errno);
        let replaced = named.identity().map(|identity| open_replaced(path, &named, identity)).transpose()?;
        let new =
            Self::begin_in(path, directory, named.name(), Mode::from_raw_mode(0o644), replaced).map_err(cannot)?;
        new.look_like_replaced();
        Ok(new)
    }

    /// Make a file that is to get this name in a directory, in which no file has it. `path` is for messages.
    ///
    /// # Errors
    /// What the system says.
    pub fn begin_beside(path: &Path, directory: &Directory, name: &OsStr, mode: Mode) -> Result<Self, Error> {
        let cannot = |errno| failed(path, "cannot be created", errno);
        Self::begin_in(path, directory, name, mode, None).map_err(cannot)
    }

    /// Make a file that is to take the place of the one with this name, which the caller holds, and has locked. Nobody but
    /// the caller may use the new one until it is given an owner and a mode.
    ///
    /// # Errors
    /// The kernel's.
    pub fn begin_replacing(
        path: &Path,
        directory: &Directory,
        name: &OsStr,
        identity: Identity,
    ) -> Result<Self, Errno> {
        let replaced = Some(Replaced { identity, file: None });
        Self::begin_in(path, directory, name, Mode::from_raw_mode(0o600), replaced)
    }

    fn begin_in(
        path: &Path,
        directory: &Directory,
        name: &OsStr,
        mode: Mode,
        replaced: Option<Replaced>,
    ) -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let flushed = openat(directory, ".", flags, Mode::empty())?;
        let (descriptor, temporary) = create(directory, name, mode)?;
        let mut new = Self {
            path: path.to_owned(),
            directory: directory.clone(),
            flushed,
            name: name.to_owned(),
            image: None,
            file: File::from(descriptor),
            temporary,
            replaced,
            published: false,
        };
        // From here on, what has a temporary name loses it.
        let clone = new.file.try_clone();
        new.image = Some(clone.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?);
        Ok(new)
    }

    /// Give it the owner and mode of the file that it replaces. Where the owner stays another, nobody else may use it.
    fn look_like_replaced(&self) {
        let found = self.replaced.as_ref().and_then(|replaced| replaced.file.as_ref()).map(fstat);
        if let Some(Ok(old)) = found {
            let own = fstat(&self.file).is_ok_and(|new| (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid));
            let owner = rustix::fs::Uid::from_raw(old.st_uid);
            let group = rustix::fs::Gid::from_raw(old.st_gid);
            let same = own || fchown(&self.file, Some(owner), Some(group)).is_ok();
            let mode = if same { old.st_mode & 0o777 } else { old.st_mode & 0o700 };
            // Best effort: the mode of a new file does no harm.
            let _ = fchmod(&self.file, Mode::from_raw_mode(mode));
        }
    }

    /// Return the directory of its name.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// As the operator gave it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name that it is to get.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Whether it has got its name.
    pub fn has_name(&self) -> bool {
        self.published
    }

    /// Return the file that it replaces, if any.
    pub fn replaces(&self) -> Option<Identity> {
        self.replaced.as_ref().map(|replaced| replaced.identity)
    }

    /// Lock the file that is replaced, so that nobody can use it.
    ///
    /// # Errors
    /// [`ErrorCode::ImageInUse`].
    pub fn lock_replaced(&mut self) -> Result<Option<OpenedFile>, Error> {
        let Some(Replaced { identity, file }) = &mut self.replaced else { return Ok(None) };
        let Some(file) = file.take() else { return Ok(None) };
        let opened = opened(file, &self.path, &self.directory, &self.name, *identity)?;
        let locked = opened.lock(Access::ReadWrite).map_err(|error| match error.code {
            ErrorCode::ImageInUse => {
                let clause =
                    "is in use by another process, and would be replaced: stop that, wait with --wait SECONDS, or \
                              choose another name";
                Error::image(&self.path, ErrorCode::ImageInUse, clause)
            }
            _ => error,
        });
        let locked = locked?;
        // Who only reads it, as a virtual machine the base of its disk, is locked out as well: it would go on with what is gone.
        lock(locked.file.file(), &self.path)?;
        Ok(Some(locked))
    }

    /// Return the open file, to be filled; `None` on a second call.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(&mut self) -> Result<Option<OpenedFile>, Error> {
        let Some(file) = self.image.take() else { return Ok(None) };
        let stat = fstat(&file).map_err(|errno| failed(&self.path, "cannot be created", errno))?;
        opened(file, &self.path, &self.directory, &self.name, Identity::of(&stat)).map(Some)
    }

    /// Return the file, to be laid out.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Give the complete file its name. With `durable`, both are on the disk afterwards.
    ///
    /// The order: the file is flushed with its mode and length; only then does it get its name, in one step that replaces what
    /// is there; then the directory is flushed. A power loss before the last leaves either what was there, or the new file.
    ///
    /// # Errors
    /// What the system says, and that somebody else made a file of that name meanwhile.
    pub fn publish(&mut self, durable: bool) -> Result<(), Error> {
        let path = self.path.clone();
        let at = |what: &'static str| {
            let path = path.clone();
            move |errno: Errno| Error::io(&path, ErrorCode::BackingIo, what, &io::Error::from(errno))
        };
        if durable {
            retry_on_intr(|| fsync(&self.file)).map_err(at("cannot be flushed"))?;
        }
        if self.directory.entry(&self.name).ok() != self.replaces() {
            let clause =
                "was made, replaced or removed by another process meanwhile, and is left alone: run the command again";
            return Err(Error::image(&path, ErrorCode::OpenFailed, clause));
        }
        self.give_name().map_err(at("cannot be given its name"))?;
        (self.temporary, self.published) = (None, true);
        if durable {
            self.flush_directory().map_err(|errno| {
                let why = reason(&io::Error::from(errno));
                let clause = format!(
                    "is complete, but its directory cannot be flushed, so that a power loss may lose it: {why}"
                );
                Error::image(&path, ErrorCode::BackingIo, clause).caused_by(&io::Error::from(errno))
            })?;
        }
        Ok(())
    }

    /// Make the changes of names in its directory durable.
    ///
    /// # Errors
    /// The kernel's.
    pub fn flush_directory(&self) -> Result<(), Errno> {
        retry_on_intr(|| fsync(&self.flushed))
    }

    fn give_name(&mut self) -> Result<(), Errno> {
        let Self { directory, name, replaced, .. } = &*self;
        match (&self.temporary, replaced) {
            // What another process makes meanwhile is not overwritten.
            (None, None) => link(&self.file, directory, name),
            (Some(temporary), None) => {
                match renameat_with(directory, temporary, directory, name, RenameFlags::NOREPLACE) {
                    // An old file system, or an old kernel.
                    Err(Errno::INVAL | Errno::NOSYS) => renameat(directory, temporary, directory, name),
                    result => result,
                }
            }
            (Some(temporary), Some(_)) => renameat(directory, temporary, directory, name),
            (None, Some(_)) => {
                // Nothing replaces a file but a rename, which takes a name.
                let (temporary, ()) = with_temporary_name(name, |temporary| link(&self.file, directory, temporary))?;
                let renamed = renameat(directory, &temporary, directory, name);
                if renamed.is_err() {
                    let _ = unlinkat(directory, &temporary, AtFlags::empty());
                }
                renamed
            }
        }
    }
}

impl Drop for NewFile {
    /// What did not get its name goes away.
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // The error that matters is the one that led here.
            let _ = unlinkat(&self.directory, temporary, AtFlags::empty());
        }
    }
}

pub(super) fn opened(
    file: File,
    path: &Path,
    directory: &Directory,
    name: &OsStr,
    identity: Identity,
) -> Result<OpenedFile, Error> {
    let file =
        FileImage::new(file).map_err(|error| Error::io(path, ErrorCode::OpenFailed, "cannot be read", &error))?;
    let (directory, holder, name) = (directory.clone(), directory.clone(), name.to_owned());
    Ok(OpenedFile { file, path: path.to_owned(), directory, holder, name, identity, block_device: false, below: None })
}

/// Open the file that is replaced. Who may not write to it may not replace it, either.
fn open_replaced(path: &Path, named: &NamedFile, identity: Identity) -> Result<Replaced, Error> {
    let opened = named.open(Access::ReadWrite, ErrorCode::OpenFailed).map_err(|error| error.at_path(path))?;
    Ok(Replaced { identity, file: Some(opened.file.into_file()) })
}

/// Make a file in a directory: without a name, or else with the one that is returned.
pub(super) fn create(directory: &Directory, name: &OsStr, mode: Mode) -> Result<(OwnedFd, Option<OsString>), Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    // Without procfs, a file that has no name cannot be given one.
    if std::fs::symlink_metadata("/proc/self/fd").is_ok() {
        match retry_on_intr(|| openat(directory, ".", flags | OFlags::TMPFILE, mode)) {
            Ok(file) => return Ok((file, None)),
            // Kernels and file systems that do not know it.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL | Errno::NOSYS) => {}
            Err(errno) => return Err(errno),
        }
    }
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let (temporary, file) = with_temporary_name(name, |temporary| openat(directory, temporary, flags, mode))?;
    Ok((file, Some(temporary)))
}

/// Link a file that has no name (`open(2)`, `O_TMPFILE`).
pub(super) fn link(file: &File, directory: &Directory, name: &OsStr) -> Result<(), Errno> {
    linkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), directory, name, AtFlags::SYMLINK_FOLLOW)
}

/// Call `make` with temporary names for `name` until one is free.
fn with_temporary_name<T>(name: &OsStr, make: impl Fn(&OsStr) -> Result<T, Errno>) -> Result<(OsString, T), Errno> {
    let process = std::process::id();
    for attempt in 0..ATTEMPTS {
        let mut temporary = OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".instar-{process}-{attempt}"));
        match make(&temporary) {
            Err(Errno::EXIST) => {}
            // The name is as long as a name can be.
            Err(Errno::NAMETOOLONG) => {
                let short = OsString::from(format!(".instar-{process}-{attempt}"));
                match make(&short) {
                    Err(Errno::EXIST) => {}
                    made => return made.map(|made| (short, made)),
                }
            }
            made => return made.map(|made| (temporary, made)),
        }
    }
    Err(Errno::EXIST)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn begun(path: &Path, named: bool) -> NewFile {
        let mut new = NewFile::begin(path).unwrap();
        if named && new.temporary.is_none() {
            // As if the file system knew no files without a name.
            let directory = &new.directory;
            let (temporary, ()) = with_temporary_name(&new.name, |name| link(&new.file, directory, name)).unwrap();
            new.temporary = Some(temporary);
        }
        new.file().write_all(b"new").unwrap();
        new
    }

    #[test]
    fn it_appears_whole_or_not_at_all() {
        for named in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image");
            drop(begun(&path, named));
            assert_eq!(names(dir.path()), [""; 0]);
            let mut new = begun(&path, named);
            assert!(!path.exists());
            new.publish(true).unwrap();
            assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["image".to_owned()], b"new".to_vec()));
        }
    }

    #[test]
    fn what_is_there_is_replaced_at_the_end() {
        for named in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image");
            fs::write(&path, "old").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            std::os::unix::fs::symlink("image", dir.path().join("link")).unwrap();
            drop(begun(&path, named));
            let mut new = begun(&dir.path().join("link"), named);
            assert_eq!(fs::read(&path).unwrap(), b"old");
            new.publish(true).unwrap();
            assert_eq!((names(dir.path()).len(), fs::read(&path).unwrap()), (2, b"new".to_vec()));
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            assert!(fs::symlink_metadata(dir.path().join("link")).unwrap().is_symlink());
        }
    }

    #[test]
    fn what_another_process_makes_meanwhile_is_left_alone() {
        for named in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image");
            let mut new = begun(&path, named);
            fs::write(&path, "another").unwrap();
            assert!(new.publish(true).unwrap_err().to_string().contains("meanwhile"));
            drop(new);
            assert_eq!((names(dir.path()).len(), fs::read(&path).unwrap()), (1, b"another".to_vec()));
            let mut new = begun(&path, named);
            fs::remove_file(&path).unwrap();
            new.publish(true).unwrap_err();
            drop(new);
            assert_eq!(names(dir.path()), [""; 0]);
        }
    }

    #[test]
    fn only_files_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |name: &str| NewFile::begin(&dir.path().join(name)).unwrap_err().to_string();
        std::os::unix::fs::symlink("absent", dir.path().join("dangling")).unwrap();
        assert!(refused("dangling").contains("leads to no file"));
        assert!(refused("absent/image").contains("directory does not exist"));
        assert!(refused(".").contains("not a regular file"));
        let long = "x".repeat(255);
        begun(&dir.path().join(&long), true).publish(true).unwrap();
        begun(&dir.path().join(&long), false).publish(true).unwrap();
        assert_eq!(names(dir.path()), ["dangling".to_owned(), long]);
    }
}
