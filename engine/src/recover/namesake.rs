//! The undo log of another device that had the same name: a volume was removed, and another one was made under its name, while the log of the
//! old one waited. To say that the new one has no log would be true, and would hide what happened.

use crate::error::Error;
use crate::escape::shell_path;
use crate::image::{DeviceIdentity, OpenedFile, UndoDirectory};
use crate::undo::{is_log_name, Header, HEADER};
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, openat, Dir, FileType, Mode, OFlags};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

/// Names of a directory that are looked at, at most.
const MOST: usize = 65_536;

/// Refuse a device without a log of its own, if there is one of another device that had its name.
///
/// # Errors
/// [`ErrorCode::RecoveryNeeded`].
pub(crate) fn refuse_namesake(
    device: &OpenedFile,
    place: &UndoDirectory,
    identity: &DeviceIdentity,
) -> Result<(), Error> {
    let Some(name) = namesake(device, place, identity) else { return Ok(()) };
    let log = place.directory().path().join(name);
    let clause = format!(
        "has the name of another device, whose undo log waits: that one was removed or replaced after an atomic commit into it that did \
         not end. If it is still to be had, under another name, run `instar recover` for that; if it is gone for good, remove the log: \
         `rm {}`",
        shell_path(&log)
    );
    Err(Error::image(&device.path, ErrorCode::RecoveryNeeded, clause))
}

fn namesake(device: &OpenedFile, place: &UndoDirectory, identity: &DeviceIdentity) -> Option<OsString> {
    let owner = fstat(device.file.file()).ok()?.st_uid;
    let names = Dir::read_from(place.listed()).ok()?.take(MOST).flatten();
    let names = names.map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
    names.filter(|name| is_log_name(name)).find(|name| {
        header(place, name, owner)
            .is_some_and(|header| header.name == identity.name.as_bytes() && header.subject != identity.digest)
    })
}

/// What a log says of its device, if it is one that counts.
fn header(place: &UndoDirectory, name: &OsStr, owner: u32) -> Option<Header> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let (_, stat) = place.directory().look(name).ok()?;
    let counts = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && [0, owner].contains(&stat.st_uid);
    let file = File::from(openat(place.directory(), name, flags, Mode::empty()).ok().filter(|_| counts)?);
    let mut block = vec![0; HEADER];
    file.read_exact_at(&mut block, 0).ok()?;
    Header::decode(&block).ok().filter(|header| header.subject != [0; 32])
}
