//! What an old target that keeps a name says of itself, until the commit has reached its end: which file has taken its place, and for
//! which overlay. A second run after a crash takes it for the backup that it asks for; every other file of that name is
//! somebody's, and stays.
//!
//! The mark is an extended attribute of the old target, durable before the new one gets the name. It names the new target by its
//! inode and its birth, and the overlay by its inode and the time of its last change: once the overlay is emptied, or
//! written to, the mark says nothing any more. So a crash in between leaves no backup that a later commit would take for its own.

use rustix::fs::{fgetxattr, fremovexattr, fsetxattr, fstat, statx, AtFlags, Stat, Statx, StatxFlags, XattrFlags};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;

/// Its name.
pub const NAME: &CStr = c"user.instar.replaced-by";
/// Bytes that it takes at most: a line for each run that was interrupted, and for this one.
const MOST: usize = 4096;

/// A file that took the place, and the overlay that it was done for: a line.
fn line(new: &File, overlay: &File) -> Option<String> {
    let look = |file: &File, wanted: StatxFlags| -> Option<Statx> {
        let found = statx(file, "", AtFlags::EMPTY_PATH, wanted | StatxFlags::INO).ok()?;
        (found.stx_mask & wanted.bits() == wanted.bits()).then_some(found)
    };
    let (new, overlay) = (look(new, StatxFlags::BTIME)?, look(overlay, StatxFlags::MTIME)?);
    let (born, changed) = (new.stx_btime, overlay.stx_mtime);
    Some(format!(
        "{} {}.{:09} {} {}.{:09}\n",
        new.stx_ino, born.tv_sec, born.tv_nsec, overlay.stx_ino, changed.tv_sec, changed.tv_nsec
    ))
}

fn read(old: &File) -> Option<String> {
    let mut value = vec![0_u8; MOST];
    let length = fgetxattr(old, NAME, &mut value[..]).ok()?;
    value.truncate(length);
    String::from_utf8(value).ok()
}

/// Whether an old target says that `target` has taken its place, in a commit of this overlay as it is now.
#[must_use]
pub fn is_replaced(old: &File, target: &File, overlay: &File) -> bool {
    // Anybody can write such a mark on a file of their own; the old target is its owner's, with the same mode.
    let same = |old: &Stat, new: &Stat| (old.st_uid, old.st_gid, old.st_mode) == (new.st_uid, new.st_gid, new.st_mode);
    if !matches!((fstat(old), fstat(target)), (Ok(old), Ok(target)) if same(&old, &target)) {
        return false;
    }
    let Some(wanted) = line(target, overlay) else { return false };
    read(old).is_some_and(|value| value.split_inclusive('\n').any(|line| line == wanted))
}

/// Have an old target say, durably, that `new` takes its place in a commit of this overlay, too. Where a file system does not take
/// that, a second run after a crash asks for another name.
///
/// # Errors
/// That the old target cannot be flushed.
pub fn set(old: &File, new: &File, overlay: &File) -> Result<(), Errno> {
    let Some(line) = line(new, overlay) else { return Ok(()) };
    let value = read(old).unwrap_or_default() + &line;
    if value.len() > MOST || fsetxattr(old, NAME, value.as_bytes(), XattrFlags::empty()).is_err() {
        return Ok(());
    }
    rustix::io::retry_on_intr(|| rustix::fs::fsync(old))
}

/// The commit has reached its end. An overlay that keeps its content is what it was, so that it has to be durable; what a crash brings
/// back says nothing of any other.
pub fn remove(old: &File) {
    if fremovexattr(old, NAME).is_ok() {
        let _ = rustix::io::retry_on_intr(|| rustix::fs::fsync(old));
    }
}
