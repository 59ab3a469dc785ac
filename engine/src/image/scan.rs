//! The images in a directory, which may hold files of anybody.
//!
//! A scan opens only regular files, for reading, and skips and counts each file that cannot be opened, read or understood. The
//! read budget of plugins bounds the cost of a file.

use super::access::Access;
use crate::cancel::Cancel;
use crate::error::Error;
use crate::lookup::{Directory, Identity};
use crate::plugins::{FileImage, IdentifyError, ImageRead, Plugin, Registry};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{ImageFacts, PROBE_NO};
use rustix::fs::{fstat, openat, Dir, DirEntry, FileType, Mode, OFlags, Stat};
use rustix::io::{retry_on_intr, Errno};
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;

/// Files of a directory that are looked at, at most: what lies in a directory that others may write to must not keep a command
/// busy for ever.
const MOST_FILES: usize = 1 << 16;
/// Bytes at the beginning of a file that are read at once. All marks but those at the end lie there, and most names.
const BEGINNING: usize = 4096;

/// An image in a directory.
#[derive(Debug)]
pub struct ScannedImage<'r> {
    /// Its name in the directory.
    pub name: OsString,
    /// Its inode when it was looked at.
    pub stat: Stat,
    /// Its identity.
    pub identity: Identity,
    /// The plugin of its format.
    pub plugin: &'r Plugin,
    /// The facts from its header.
    pub facts: ImageFacts,
}

/// A file that could not be looked at.
#[derive(Clone, Copy, Debug)]
pub struct Unseen;

/// The part of a directory that a scan has passed over.
#[derive(Clone, Copy, Debug)]
pub struct Passed {
    /// Number of files that could not be examined, because they cannot be opened or read, or are not sound images.
    pub files: usize,
    /// Whether the directory could be listed to its end.
    pub listed: bool,
}

/// A scan of directories.
#[derive(Clone, Copy, Debug)]
pub struct Scan<'r, 's> {
    /// The plugins.
    pub registry: &'r Registry,
    /// The handle that ends the scan.
    pub cancel: &'s Cancel,
    /// The plugin of the only format that is looked for; `None`: any format.
    pub only: Option<&'r Plugin>,
}

impl<'r> Scan<'r, '_> {
    /// Give each image in this directory to `take`, but for those that were `seen`; what `take` answers with `true` becomes one of
    /// them. A file with several names may come several times otherwise. Links are not followed.
    ///
    /// # Errors
    /// [`ErrorCode::Interrupted`].
    pub fn images_in(
        &self,
        directory: &Directory,
        seen: &mut HashSet<Identity>,
        mut take: impl FnMut(ScannedImage<'r>) -> Result<bool, Unseen>,
    ) -> Result<Passed, Error> {
        let mut passed = Passed { files: 0, listed: true };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = retry_on_intr(|| openat(directory, ".", flags, Mode::empty()));
        let Ok(entries) = opened.and_then(Dir::new) else { return Ok(Passed { listed: false, ..passed }) };
        let mut files = 0;
        let device = directory.stat().map(|stat| stat.st_dev);
        for entry in entries {
            let Ok(entry) = entry else {
                passed.listed = false;
                break;
            };
            if self.cancel.is_cancelled() {
                let clause = "interrupted while looking for other images";
                return Err(Error::image(directory.path(), ErrorCode::Interrupted, clause));
            }
            // Most of those that were seen need not be opened again; some file systems have other numbers here.
            let listed = device.map(|device| Identity::of_file(device, entry.ino()));
            if !is_regular(directory, &entry) || listed.is_ok_and(|listed| seen.contains(&listed)) {
                continue;
            }
            files += 1;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            let image = if files > MOST_FILES { Err(Unseen) } else { self.look(directory, name, seen) };
            match image.and_then(|image| image.map_or(Ok(None), |image| Ok(Some((image.identity, take(image)?))))) {
                Ok(Some((identity, true))) => {
                    seen.insert(identity);
                }
                Ok(Some((_, false)) | None) => {}
                Err(Unseen) => passed.files += 1,
            }
        }
        Ok(passed)
    }

    /// The image that a file is, if it is one and was not `seen`.
    fn look(
        &self,
        directory: &Directory,
        name: &OsStr,
        seen: &HashSet<Identity>,
    ) -> Result<Option<ScannedImage<'r>>, Unseen> {
        // What takes the place of a file now must neither block nor become the terminal of the process.
        let flags = Access::Shared.flags() | OFlags::NOFOLLOW;
        let file = match retry_on_intr(|| openat(directory, name, flags, Mode::empty())) {
            Ok(file) => file,
            // It is gone, or no file any more.
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(None),
            Err(_) => return Err(Unseen),
        };
        let stat = fstat(&file).map_err(|_| Unseen)?;
        let identity = Identity::of(&stat);
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || stat.st_size == 0 || seen.contains(&identity) {
            return Ok(None);
        }
        let image = Glance::new(File::from(file)).map_err(|_| Unseen)?;
        let of_other_format = |plugin: &Plugin| plugin.probe(&image).is_ok_and(|score| score == PROBE_NO);
        if self.only.is_some_and(of_other_format) {
            return Ok(None);
        }
        match self.registry.identify(&image, None) {
            Ok(found) => {
                let name = name.to_owned();
                Ok(Some(ScannedImage { name, stat, identity, plugin: found.plugin, facts: found.facts }))
            }
            Err(IdentifyError::Ambiguous(_) | IdentifyError::Plugin(_)) => Err(Unseen),
            // Nothing that records a backing, as far as anybody here knows.
            Err(_) => Ok(None),
        }
    }
}

/// Whether an entry is a regular file. It is not opened: that of a device or a FIFO can have an effect.
fn is_regular(directory: &Directory, entry: &DirEntry) -> bool {
    match entry.file_type() {
        FileType::RegularFile => true,
        // Some file systems do not say.
        FileType::Unknown => directory
            .look(OsStr::from_bytes(entry.file_name().to_bytes()))
            .is_ok_and(|(_, stat)| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile),
        _ => false,
    }
}

/// A file of which every plugin reads the beginning: that is read once.
struct Glance {
    image: FileImage,
    beginning: Vec<u8>,
}

impl Glance {
    fn new(file: File) -> io::Result<Self> {
        let image = FileImage::new(file)?;
        let mut beginning = vec![0; BEGINNING];
        let length = image.read_at(0, &mut beginning)?;
        beginning.truncate(length);
        Ok(Self { image, beginning })
    }
}

impl ImageRead for Glance {
    fn length(&self) -> u64 {
        self.image.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        match self.beginning.get(start..end) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(bytes.len())
            }
            None => self.image.read_at(offset, buffer),
        }
    }
}
