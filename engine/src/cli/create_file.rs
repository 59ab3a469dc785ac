//! Writing a new image to its file.

use crate::error::Error;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{CreatedFile, CreatedImage, ImageRegion, ReservedRange};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The bytes of an image file on which QEMU, and instar, hold their locks: 100 to 203. Nothing is stored in them; they only
/// are the names of permissions.
const LOCK_START: i64 = 100;
const LOCK_LENGTH: i64 = 104;

/// Write `image` to `path`, and its other files beside it, none of which may exist. A file that exists is overwritten, unless
/// it is `kept`. What did not exist is removed again if that fails.
pub(super) fn write(path: &Path, image: &CreatedImage, kept: bool) -> Result<(), Error> {
    let mut made = Vec::new();
    if kept && path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    let result = image
        .files
        .iter()
        .try_for_each(|file| write_beside(&path.with_file_name(OsStr::from_bytes(&file.name)), file, &mut made))
        .and_then(|()| write_image(path, image, kept));
    if result.is_err() {
        // The error that matters is the one that is returned.
        made.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
    result
}

/// Write a file that does not exist yet; `made` takes its path once it does.
fn write_beside(path: &Path, file: &CreatedFile, made: &mut Vec<PathBuf>) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o644).custom_flags(libc::O_CLOEXEC);
    let opened = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            let clause =
                "exists, and is not overwritten: it would be part of the new image; remove it, or choose another name";
            Error::image(path, ErrorCode::OpenFailed, clause)
        }
        _ => Error::io(path, ErrorCode::OpenFailed, "cannot be created", &error),
    })?;
    made.push(path.to_owned());
    write_to(&opened, path, file.length, &file.regions, &[])
}

/// The refusal of `--no-clobber`.
fn exists(path: &Path) -> Error {
    Error::image(path, ErrorCode::OpenFailed, "exists, and --no-clobber keeps it: choose another name, or remove it")
}

fn write_image(path: &Path, image: &CreatedImage, kept: bool) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o644).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let opened = match options.clone().create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && kept => return Err(exists(path)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // `create` for a link whose target is not there.
            options.create(true).truncate(false).open(path).map(|file| (file, false))
        }
        Err(error) => Err(error),
    };
    let (file, created) =
        opened.map_err(|error| Error::io(path, ErrorCode::OpenFailed, "cannot be created", &error))?;
    let result = write_to(&file, path, image.length, &image.regions, &image.reserved);
    if result.is_err() && created {
        // The error that matters is the one that is returned.
        let _ = std::fs::remove_file(path);
    }
    result
}

fn write_to(
    mut file: &File,
    path: &Path,
    wanted: u64,
    regions: &[ImageRegion],
    reserved: &[ReservedRange],
) -> Result<(), Error> {
    let failed = |error: io::Error| Error::io(path, ErrorCode::OverlayIo, "cannot be written", &error);
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::image(path, ErrorCode::OpenFailed, "is not a file or block device"));
    }
    lock(file, path)?;
    if kind.is_file() {
        file.set_len(0).and_then(|()| file.set_len(wanted)).map_err(failed)?;
    } else {
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if length < wanted {
            let clause = format!("the device has {length} bytes, {wanted} are needed");
            return Err(Error::image(path, ErrorCode::NoSpace, clause));
        }
        zero(file, 0, wanted).map_err(failed)?;
    }
    if kind.is_file() {
        reserved.iter().try_for_each(|range| reserve(file, range)).map_err(failed)?;
    }
    for region in regions {
        file.write_all_at(&region.bytes, region.offset).map_err(failed)?;
    }
    file.sync_data().map_err(failed)
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
fn lock(file: &File, path: &Path) -> Result<(), Error> {
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
        Some(libc::EAGAIN | libc::EACCES) => {
            Err(Error::image(path, ErrorCode::ImageInUse, "another process uses the image"))
        }
        // File systems without locks.
        _ => Ok(()),
    }
}
