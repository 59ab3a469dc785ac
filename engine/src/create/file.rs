//! Writing a new image to its file.

use crate::bytes::Bytes;
use crate::error::{Error, TOO_LONG};
use crate::image::{refuse_used_through_loop, remember_loops, Access, NamedFile};
use crate::lookup::Directory;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{CreatedFile, CreatedImage, ImageRegion, ReservedRange};
use rustix::fs::{openat, unlinkat, AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

/// The bytes of an image file on which QEMU, and instar, hold their locks: 100 to 203. Nothing is stored in them; they only
/// are the names of permissions.
const LOCK_START: i64 = 100;
const LOCK_LENGTH: i64 = 104;

/// Write `image` to `new`, replacing the content of an existing file unless it is `kept`, and the image's other files beside
/// it, none of which may exist. On failure, remove the files that did not exist before. Everything happens in the directory
/// that was opened when `new` was looked at.
pub fn write(new: &NamedFile, image: &CreatedImage, kept: bool) -> Result<(), Error> {
    let Some(directory) = new.directory() else {
        return Err(Error::image(new.path(), ErrorCode::OpenFailed, "cannot be created: its directory does not exist"));
    };
    let mut made = Vec::new();
    if kept && directory.look(new.name()).is_ok() {
        return Err(exists(new.path()));
    }
    let result = image
        .files
        .iter()
        .try_for_each(|file| write_beside(directory, file, &mut made))
        .and_then(|()| write_image(new, directory, image, kept, &mut made));
    if result.is_err() {
        // The error that matters is the one that is returned.
        for name in &made {
            let _ = unlinkat(directory, name, AtFlags::empty());
        }
    }
    result
}

/// Open a file to be written, without blocking on one that turns out to be a FIFO.
fn open(directory: &Directory, name: &OsStr, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(File::from(openat(directory, name, flags, Mode::from_raw_mode(0o644))?))
}

/// Write a file that does not exist yet; `made` takes its name once it does.
fn write_beside(directory: &Directory, file: &CreatedFile, made: &mut Vec<OsString>) -> Result<(), Error> {
    let name = OsStr::from_bytes(&file.name);
    let path = &directory.path().join(name);
    let opened = open(directory, name, OFlags::CREATE | OFlags::EXCL).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            let clause =
                "exists, and is not overwritten: it would be part of the new image; remove it, or choose another name";
            Error::image(path, ErrorCode::OpenFailed, clause)
        }
        _ => Error::io(path, ErrorCode::OpenFailed, "cannot be created", &error),
    })?;
    made.push(name.to_owned());
    write_to(&opened, path, file.length, &file.regions, &[])?;
    flushed(&opened, path)
}

/// The refusal of `--no-clobber`.
fn exists(path: &Path) -> Error {
    Error::image(path, ErrorCode::OpenFailed, "exists, and --no-clobber keeps it: choose another name, or remove it")
}

fn write_image(
    new: &NamedFile,
    directory: &Directory,
    image: &CreatedImage,
    kept: bool,
    made: &mut Vec<OsString>,
) -> Result<(), Error> {
    let (path, name) = (new.path(), new.name());
    // Only what can become an image is opened.
    if new.identity().is_some() && new.length().is_none() && !new.is_block_device() {
        return Err(Error::image(path, ErrorCode::OpenFailed, "is not a file or block device"));
    }
    // Nobody has it mounted, and until it is written, nobody can mount it.
    let _claim = new.claim()?;
    let opened = match open(directory, name, OFlags::CREATE | OFlags::EXCL) {
        Ok(file) => {
            made.push(name.to_owned());
            Ok(file)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && kept => return Err(exists(path)),
        // Creates the target of a link, if that is not there.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open(directory, name, OFlags::CREATE),
        Err(error) => Err(error),
    };
    let file = opened.map_err(|error| Error::io(path, ErrorCode::OpenFailed, "cannot be created", &error))?;
    if new.identity().is_some() {
        remember_loops();
        refuse_used_through_loop(&file, path, Access::ReadWrite)?;
    }
    write_to(&file, path, image.length, &image.regions, &image.reserved)?;
    flushed(&file, path)
}

fn flushed(file: &File, path: &Path) -> Result<(), Error> {
    file.sync_data().map_err(|error| Error::io(path, ErrorCode::OverlayIo, "cannot be written", &error))
}

/// Lay out an image in an open file and drop its previous content. `wanted` is the length of the image in bytes. Does not
/// flush.
///
/// # Errors
/// [`ErrorCode::ImageInUse`], and what the system says of a write that fails.
pub(crate) fn write_to(
    mut file: &File,
    path: &Path,
    wanted: u64,
    regions: &[ImageRegion],
    reserved: &[ReservedRange],
) -> Result<(), Error> {
    let failed = |error: io::Error| unwritten(path, "cannot be written", &error);
    let found = file.metadata().map_err(failed)?;
    let kind = found.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::image(path, ErrorCode::OpenFailed, "is not a file or block device"));
    }
    lock(file, path)?;
    if kind.is_file() {
        // ext4 writes a file that was cut to nothing to the disk when it is closed (auto_da_alloc), as much as that may be by then:
        // one that is empty is not cut.
        let emptied = if found.len() == 0 { Ok(()) } else { file.set_len(0) };
        emptied.and_then(|()| file.set_len(wanted)).map_err(failed)?;
    } else {
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if length < wanted {
            let clause = format!("the device has {}, and {} are needed", Bytes(length), Bytes(wanted));
            return Err(Error::image(path, ErrorCode::NoSpace, clause));
        }
        zero(file, 0, wanted).map_err(failed)?;
    }
    if kind.is_file() {
        reserved.iter().try_for_each(|range| reserve(file, range)).map_err(failed)?;
    }
    for region in regions {
        file.write_all_at(&region.bytes, region.offset).map_err(|error| {
            let what = format!("cannot be written at offset {}", region.offset);
            unwritten(path, &what, &error)
        })?;
    }
    Ok(())
}

/// The system does not write what an image begins with.
fn unwritten(path: &Path, what: &str, error: &io::Error) -> Error {
    let error_of_image = Error::io(path, ErrorCode::BackingIo, what, error);
    match error.raw_os_error() {
        Some(libc::EFBIG) => error_of_image.in_state(TOO_LONG),
        _ => error_of_image,
    }
}

/// Have the file system keep the space of a range, which reads as zeroes; one that cannot is made to by writing them.
fn reserve(file: &File, range: &ReservedRange) -> io::Result<()> {
    if range.length == 0 {
        return Ok(());
    }
    if !range.written {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), range.offset, range.length) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    zero(file, range.offset, range.length)
}

/// Write `length` zeroes at `offset`.
fn zero(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let zeroes = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < length {
        let count = usize::try_from(length - at).unwrap_or(usize::MAX).min(zeroes.len());
        file.write_all_at(&zeroes[..count], offset + at)?;
        at += count as u64;
    }
    Ok(())
}

/// Lock out every process that uses the image, until the file is closed. Fails if there is one.
///
/// # Errors
/// [`ErrorCode::ImageInUse`].
pub(crate) fn lock(file: &File, path: &Path) -> Result<(), Error> {
    // SAFETY: `flock` is a C structure of integers, for which zero is a value.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are small; the field is 16 bits wide.
    range.l_type = i16::try_from(libc::F_WRLCK).unwrap_or(1);
    range.l_whence = i16::try_from(libc::SEEK_SET).unwrap_or(0);
    range.l_start = LOCK_START;
    range.l_len = LOCK_LENGTH;
    // SAFETY: the descriptor is open and `range` is a valid `flock` for the duration of the call.
    let status = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, std::ptr::from_ref(&range)) };
    if status == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(Error::image(
            path,
            ErrorCode::ImageInUse,
            "is in use by another process, and would be overwritten: stop that, or choose another name",
        )),
        // File systems without locks.
        _ => Ok(()),
    }
}
