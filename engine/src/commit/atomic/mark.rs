//! The mark of an old target that keeps a name: until the commit has reached its end, it says which file has taken the
//! target's place, and for which overlay. By the mark, a second run after a crash recognizes the backup that it asks
//! for; any other file of that name is somebody's, and stays.
//!
//! The mark is an extended attribute of the old target, durable before the new one gets the name. It identifies the new
//! target by inode and time of birth, and the overlay by inode and time of last change, so it becomes invalid once the
//! overlay is emptied or written to. So a crash in between leaves no backup that a later commit would take for its own.
//!
//! When the commit has reached its end, the mark of the old target records that instead, with the times at which the overlay and
//! the new target last changed. A run that is repeated because nobody saw the end of the first one accepts the backup if neither
//! has changed since, or if it has nothing to commit. Any other run does not.

use rustix::fs::{fgetxattr, fremovexattr, fsetxattr, fstat, statx, AtFlags, Stat, Statx, StatxFlags, XattrFlags};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;

/// Its name.
pub const NAME: &CStr = c"user.instar.replaced-by";
/// Its maximum length in bytes: one line for each interrupted run, and one for this one.
const MOST: usize = 4096;

/// One line: the file that took the place, and the overlay that was committed.
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

/// The line of a commit that has ended: the same, with the times at which the overlay and the new target were changed last.
fn ended_line(new: &File, overlay: &File) -> Option<String> {
    let line = line(new, overlay)?;
    let (named, changed) = line.trim_end().rsplit_once(' ')?;
    let target = statx(new, "", AtFlags::EMPTY_PATH, StatxFlags::MTIME).ok()?.stx_mtime;
    Some(format!("{named} ended {changed} {}.{:09}\n", target.tv_sec, target.tv_nsec))
}

/// Whether an old target says that `target` has taken its place in a commit of this overlay, in whatever state the two are by now: it
/// is the backup of a commit that has nothing left to do.
#[must_use]
pub fn is_ended(old: &File, target: &File, overlay: &File) -> bool {
    let named = |line: &str| line.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let Some(wanted) = line(target, overlay).as_deref().map(named).filter(|_| looks_like(old, target)) else {
        return false;
    };
    read(old).is_some_and(|value| value.lines().any(|line| named(line) == wanted))
}

/// Anybody can write such a mark on a file of their own; the old target is its owner's, with the same mode.
fn looks_like(old: &File, target: &File) -> bool {
    let same = |old: &Stat, new: &Stat| (old.st_uid, old.st_gid, old.st_mode) == (new.st_uid, new.st_gid, new.st_mode);
    matches!((fstat(old), fstat(target)), (Ok(old), Ok(target)) if same(&old, &target))
}

fn read(old: &File) -> Option<String> {
    let mut value = vec![0_u8; MOST];
    let length = fgetxattr(old, NAME, &mut value[..]).ok()?;
    value.truncate(length);
    String::from_utf8(value).ok()
}

/// Whether the mark of an old target says that `target` has taken its place, in a commit of this overlay in its present
/// state.
#[must_use]
pub fn is_replaced(old: &File, target: &File, overlay: &File) -> bool {
    if !looks_like(old, target) {
        return false;
    }
    let wanted = [line(target, overlay), ended_line(target, overlay)];
    let says = |line: &str| wanted.iter().flatten().any(|wanted| line == wanted);
    read(old).is_some_and(|value| value.split_inclusive('\n').any(says))
}

/// Add to an old target's mark, durably, that `new` takes its place in a commit of this overlay. On a file system
/// without extended attributes, a second run after a crash asks for another name.
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

/// Record that the commit has reached its end. An overlay that keeps its content still matches the earlier mark, so this has
/// to be durable; for any other overlay, a mark that a crash brings back is invalid.
pub fn end(old: &File, new: &File, overlay: &File) {
    match ended_line(new, overlay) {
        Some(line) if read(old).is_some() => {
            if fsetxattr(old, NAME, line.as_bytes(), XattrFlags::empty()).is_ok() {
                let _ = rustix::io::retry_on_intr(|| rustix::fs::fsync(old));
            }
        }
        _ => remove(old),
    }
}

/// Remove the mark, because nothing takes the place of the old target after all.
pub fn remove(old: &File) {
    if fremovexattr(old, NAME).is_ok() {
        let _ = rustix::io::retry_on_intr(|| rustix::fs::fsync(old));
    }
}
