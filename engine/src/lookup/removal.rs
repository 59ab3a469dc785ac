//! Whether a name can be removed from its directory, or be given to another file.

use crate::error::reason;
use rustix::fs::{accessat, fstat, Access, AtFlags, Stat};
use std::os::fd::OwnedFd;

/// Set in `st_mode` of a directory in which only the owner of a file, its own, and the superuser may remove it (inode(7)).
const STICKY: u32 = 0o1000;

/// The reason why this user may not remove a file, `found` like this, from its directory: the directory is not
/// writable, or it is sticky, and both it and the file belong to somebody else. Other obstacles, such as an attribute
/// of the file, show only when the file is removed.
pub fn removal_denied(directory: &OwnedFd, found: &Stat) -> Option<String> {
    if let Err(errno) = accessat(directory, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        return Some(reason(&errno.into()));
    }
    let stat = fstat(directory).ok()?;
    let user = rustix::process::geteuid().as_raw();
    let sticky = stat.st_mode & STICKY != 0 && user != 0 && user != stat.st_uid && user != found.st_uid;
    sticky.then(|| "the directory is sticky, and neither it nor the file is yours".to_owned())
}
