//! What an overlay says of itself while it is on the way to the place of another file: which file that is.
//!
//! The mark is an extended attribute of the overlay, durable before the overlay names the target's parent, and gone once it has the
//! target's name. It names the target by its inode, its size and the time of its last change, which an adoption leaves alone. A
//! second run that finds it finishes the first one, and does so only where the operator names the file that the first one was to
//! replace, as it was then. The other lines name the layers between the two in the same way, which are on the target no less than
//! other images, and stale nevertheless. What a crash leaves of it on a complete target names a file that is gone, and means nothing: the
//! next run with the same names removes it.

use crate::lookup::Directory;
use rustix::fs::{fgetxattr, fremovexattr, fstat, fsync, openat, Dir, Mode, OFlags, Stat};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::CStr;
use std::fs::File;

/// Its name.
pub const NAME: &CStr = c"user.instar.takes-the-place-of";
/// Bytes that it takes at most.
const MOST: usize = 2048;

/// What an overlay says about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It is on the way to its place, over these layers.
    This(Stale),
    /// It is on the way to the place of another file, or of this one before it was changed.
    Another,
    /// It is on no way.
    Nothing,
    /// Its file system has no room for a mark.
    Unknown,
}

/// The layers between an overlay and its target, as a mark names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stale(Vec<String>);

impl Stale {
    /// Whether a file is one of them, as it was then.
    #[must_use]
    pub fn contains(&self, file: &Stat) -> bool {
        self.0.contains(&line(file))
    }
}

/// A file, as a mark names it.
fn line(target: &Stat) -> String {
    format!("{} {} {}.{:09}", target.st_ino, target.st_size, target.st_mtime, target.st_mtime_nsec)
}

/// What an overlay says about the file that the operator names.
///
/// # Errors
/// What the system says.
pub fn read(overlay: &File, target: &File) -> Result<Said, Errno> {
    let mut value = vec![0_u8; MOST];
    let length = match fgetxattr(overlay, NAME, &mut value[..]) {
        Ok(length) => length,
        Err(Errno::NODATA) => return Ok(Said::Nothing),
        Err(Errno::OPNOTSUPP) => return Ok(Said::Unknown),
        Err(Errno::RANGE) => return Ok(Said::Another),
        Err(errno) => return Err(errno),
    };
    value.truncate(length);
    let (own, other) = (fstat(overlay)?, fstat(target)?);
    // A mark that comes with a file from elsewhere does not come with the target's owner and mode.
    let alike = (own.st_uid, own.st_gid, own.st_mode) == (other.st_uid, other.st_gid, other.st_mode);
    let mut lines = std::str::from_utf8(&value).unwrap_or_default().lines().map(str::to_owned);
    Ok(if alike && lines.next() == Some(line(&other)) { Said::This(Stale(lines.collect())) } else { Said::Another })
}

/// What an overlay says that is on the way to the place of a file, over layers; of those, the ones that there is room for.
///
/// # Errors
/// What the system says.
pub fn text<'f>(target: &File, between: impl IntoIterator<Item = &'f File>) -> Result<Vec<u8>, Errno> {
    let mut text = line(&fstat(target)?);
    for layer in between {
        let next = line(&fstat(layer)?);
        if text.len() + 1 + next.len() > MOST {
            break;
        }
        text = text + "\n" + &next;
    }
    Ok(text.into_bytes())
}

/// Remove the mark of a file that a killed run has left in its place: the file that the mark names is gone from the directory, which
/// holds both as long as there is something left to do.
pub fn remove_if_done(file: &File, directory: &Directory) {
    let mut value = vec![0_u8; MOST];
    let length = fgetxattr(file, NAME, &mut value[..]).unwrap_or(0);
    let text = std::str::from_utf8(&value[..length]).unwrap_or_default();
    let Some(Ok(inode)) = text.split(' ').next().map(str::parse::<u64>) else { return };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(listed) = retry_on_intr(|| openat(directory, ".", flags, Mode::empty())) else { return };
    let is_gone = |mut entries: Dir| entries.all(|entry| entry.is_ok_and(|entry| entry.ino() != inode));
    // A power loss could undo a rename that is not durable, and without the mark nothing would complete it.
    if Dir::read_from(&listed).is_ok_and(is_gone) && retry_on_intr(|| fsync(&listed)).is_ok() {
        remove(file);
    }
}

/// The overlay has taken the place. A mark that stays means nothing, so that it is no failure.
pub fn remove(overlay: &File) {
    if fremovexattr(overlay, NAME).is_ok() {
        let _ = retry_on_intr(|| fsync(overlay));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Write;

    fn marked(overlay: &File, text: &[u8]) -> bool {
        rustix::fs::fsetxattr(overlay, NAME, text, rustix::fs::XattrFlags::empty()).is_ok()
    }

    #[test]
    fn it_means_one_file_as_it_is() {
        let [overlay, mut target, other] = std::array::from_fn(|_| tempfile::tempfile().unwrap());
        if !marked(&overlay, &text(&target, [&other]).unwrap()) {
            assert_eq!(read(&overlay, &target), Ok(Said::Unknown));
            return;
        }
        let stale = Stale(vec![line(&fstat(&other).unwrap())]);
        assert!(stale.contains(&fstat(&other).unwrap()) && !stale.contains(&fstat(&target).unwrap()));
        assert_eq!(read(&overlay, &target), Ok(Said::This(stale.clone())));
        assert_eq!(read(&overlay, &other), Ok(Said::Another));
        let mode = fstat(&target).unwrap().st_mode & 0o7777;
        for (mode, said) in [(mode ^ 0o111, Said::Another), (mode, Said::This(stale))] {
            rustix::fs::fchmod(&overlay, rustix::fs::Mode::from_raw_mode(mode)).unwrap();
            assert_eq!(read(&overlay, &target), Ok(said));
        }
        target.write_all(b"x").unwrap();
        assert_eq!(read(&overlay, &target), Ok(Said::Another));
        for strange in [&b""[..], b"\xff", &[b'x'; 3000]] {
            assert!(marked(&overlay, strange));
            assert_eq!(read(&overlay, &target), Ok(Said::Another));
        }
        remove(&overlay);
        assert_eq!(read(&overlay, &target), Ok(Said::Nothing));
    }

    #[test]
    fn a_long_chain_fits() {
        let files: Vec<File> = (0..200).map(|_| tempfile::tempfile().unwrap()).collect();
        let text = text(&files[0], &files).unwrap();
        assert!((MOST - 100..=MOST).contains(&text.len()));
    }
}
