//! The other files of a new image in several: they have no names before the image is complete, and get them before the file
//! that names them does.

use super::file::write_to;
use super::new_file::{create, link, opened, NewFile};
use crate::error::Error;
use crate::image::OpenedFile;
use crate::lookup::{Directory, Identity};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::CreatedFile;
use rustix::fs::{fchmod, fchown, fstat, fsync, renameat_with, unlinkat, AtFlags, Gid, Mode, RenameFlags, Uid};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A file that is to be a part of the image.
#[derive(Debug)]
struct Part {
    /// The file twice: for its name, and for the image.
    file: File,
    image: Option<File>,
    /// The name that it has meanwhile, where the file system knows no files without one.
    temporary: Option<OsString>,
    /// The one that it gets, once it is known.
    name: Option<OsString>,
    /// It has that name.
    named: bool,
}

/// Files that become parts of a new image, each once its name is known.
#[derive(Debug)]
pub struct Parts {
    directory: Directory,
    parts: Vec<Part>,
}

impl Parts {
    /// Make `count` files, beside a new one whose mode and owner they get.
    ///
    /// # Errors
    /// What the system says.
    pub fn begin(new: &NewFile, count: usize) -> Result<Self, Error> {
        let cannot = |errno: Errno| {
            Error::io(new.path(), ErrorCode::OpenFailed, "cannot be created in several files", &io::Error::from(errno))
        };
        let like = fstat(new.file()).map_err(cannot)?;
        // From here on, what has a temporary name loses it.
        let mut all = Self { directory: new.directory().clone(), parts: Vec::with_capacity(count) };
        for number in 0..count {
            let mut base = new.name().to_owned();
            base.push(format!(".{number}"));
            let (file, temporary) = create(&all.directory, &base, Mode::from_raw_mode(0o600)).map_err(cannot)?;
            let file = File::from(file);
            all.parts.push(Part { file, image: None, temporary, name: None, named: false });
            let Some(Part { file, image, .. }) = all.parts.last_mut() else { continue };
            let clone = file.try_clone();
            *image = Some(clone.map_err(|error| cannot(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?);
            let file = &*file;
            let own = fstat(file).is_ok_and(|own| (own.st_uid, own.st_gid) == (like.st_uid, like.st_gid));
            let (owner, group) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
            if own || fchown(file, Some(owner), Some(group)).is_ok() {
                // Best effort: nobody else may use it as it is.
                let _ = fchmod(file, Mode::from_raw_mode(like.st_mode & 0o777));
            }
        }
        Ok(all)
    }

    /// Lay these parts of an image out, and give them back in their order, open, to be filled. Files that are left over go
    /// away.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`] for a name that a file has already, which is not replaced: no order of steps replaces several
    /// files at once. [`ErrorCode::UnsupportedFormat`] for more parts than there are files. What the system says.
    pub fn lay_out(&mut self, new: &NewFile, files: &[CreatedFile]) -> Result<Vec<OpenedFile>, Error> {
        if files.len() > self.parts.len() {
            let clause = format!(
                "would be an image in {} files, and {} are supported: choose a kind in fewer files with -o",
                files.len().saturating_add(1),
                self.parts.len().saturating_add(1)
            );
            return Err(Error::image(new.path(), ErrorCode::UnsupportedFormat, clause));
        }
        while self.parts.len() > files.len() {
            self.parts.pop().iter().for_each(|part| part.give_up(&self.directory));
        }
        let mut all = Vec::with_capacity(files.len());
        for (part, file) in self.parts.iter_mut().zip(files) {
            let name = OsStr::from_bytes(&file.name);
            let path = self.directory.path().join(name);
            if self.directory.entry(name).is_ok() {
                let clause = "exists, and is not overwritten: it would be part of the new image; remove it, or choose another name";
                return Err(Error::image(&path, ErrorCode::OpenFailed, clause));
            }
            let failed = |error: &io::Error| Error::io(&path, ErrorCode::OpenFailed, "cannot be created", error);
            part.name = Some(name.to_owned());
            write_to(&part.file, &path, file.length, &file.regions, &[])?;
            let stat = fstat(&part.file).map_err(|errno| failed(&errno.into()))?;
            let image = part.image.take().ok_or_else(|| failed(&Errno::BADF.into()))?;
            all.push(opened(image, &path, &self.directory, name, Identity::of(&stat))?);
        }
        Ok(all)
    }

    /// The image is complete: flush its parts and give them their names, and then `new`, which names them, its own. With
    /// `durable`, all of it is on the disk afterwards.
    ///
    /// The order: all parts are flushed; they get their names, which nothing knows; the directory is flushed; then the file that
    /// names them is published ([`NewFile::publish`]). A power loss before that leaves parts at most, which no image names. What
    /// fails takes the names back.
    ///
    /// # Errors
    /// What the system says, and that somebody else made a file of one of the names meanwhile.
    pub fn publish(mut self, new: &mut NewFile, durable: bool) -> Result<(), Error> {
        for part in self.parts.iter().filter(|_| durable) {
            retry_on_intr(|| fsync(&part.file)).map_err(|errno| self.failed(part, "cannot be flushed", errno))?;
        }
        for index in 0..self.parts.len() {
            let Some(part) = self.parts.get(index) else { continue };
            part.give_name(&self.directory).map_err(|errno| match errno {
                Errno::EXIST => {
                    let clause = "was made by another process meanwhile, and is left alone: run the command again";
                    Error::image(&self.path(part), ErrorCode::OpenFailed, clause)
                }
                errno => self.failed(part, "cannot be given its name", errno),
            })?;
            if let Some(part) = self.parts.get_mut(index) {
                (part.temporary, part.named) = (None, true);
            }
        }
        if durable && !self.parts.is_empty() {
            let cannot = |errno: Errno| {
                let what = "cannot be flushed, as its directory cannot";
                Error::io(new.path(), ErrorCode::BackingIo, what, &io::Error::from(errno))
            };
            new.flush_directory().map_err(cannot)?;
        }
        let result = new.publish(durable);
        if new.has_name() {
            self.parts.clear();
        }
        result
    }

    fn path(&self, part: &Part) -> PathBuf {
        self.directory.path().join(part.name.as_deref().unwrap_or_default())
    }

    fn failed(&self, part: &Part, what: &str, errno: Errno) -> Error {
        Error::io(&self.path(part), ErrorCode::BackingIo, what, &io::Error::from(errno))
    }
}

impl Part {
    /// Give it its name, if no file has that.
    fn give_name(&self, directory: &Directory) -> Result<(), Errno> {
        let Some(name) = &self.name else { return Ok(()) };
        match &self.temporary {
            None => link(&self.file, directory, name),
            Some(temporary) => match renameat_with(directory, temporary, directory, name, RenameFlags::NOREPLACE) {
                // An old file system, or an old kernel: a link replaces nothing, either.
                Err(Errno::INVAL | Errno::NOSYS) => {
                    rustix::fs::linkat(directory, temporary, directory, name, AtFlags::empty())?;
                    unlinkat(directory, temporary, AtFlags::empty())
                }
                result => result,
            },
        }
    }

    /// Take its name away.
    fn give_up(&self, directory: &Directory) {
        // The error that matters is the one that led here.
        if let Some(temporary) = &self.temporary {
            let _ = unlinkat(directory, temporary, AtFlags::empty());
        }
        if let Some(name) = self.name.as_ref().filter(|_| self.named) {
            // Not if another file has it by now.
            let own = fstat(&self.file).map(|stat| Identity::of(&stat)).ok();
            let there = directory.entry(name).ok();
            if own.is_some() && own == there {
                let _ = unlinkat(directory, name, AtFlags::empty());
            }
        }
    }
}

impl Drop for Parts {
    /// Parts of no image go away.
    fn drop(&mut self) {
        self.parts.iter().for_each(|part| part.give_up(&self.directory));
    }
}
