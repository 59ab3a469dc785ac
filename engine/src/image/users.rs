//! Finding the process that uses an image, for the message about it.
//!
//! QEMU's locks belong to open file descriptions, and the kernel does not report their owners. A confined process cannot look
//! for the owners, so the search comes before. It is best effort: processes of other users are invisible.
//!
//! The search reads the kernel's list of locks, for which every processor has to pass through the scheduler (`file_rwsem` of
//! `fs/locks.c`): that takes more than ten milliseconds, several times as long as a small commit. So as long as the files are
//! few, they are tested first, and the search is skipped if none is locked.

use crate::devices::lock::{is_locked, LOCKED};
use crate::escape::escape_bytes;
use crate::lookup::Identity;
use rustix::fs::{FileType, Mode, OFlags, Stat};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirEntryExt;
use std::path::Path;
use std::sync::OnceLock;

/// Most names of a directory that are compared with the list of locks.
const MOST_NAMES: usize = 10_000;
/// Most files that are asked whether they are locked. Each takes some microseconds; of more, the list is read.
const MOST_ASKED: usize = 64;

/// A process that has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    file: Identity,
    /// Its number.
    pub(super) process: u32,
    /// Its name, for people.
    pub(super) name: String,
}

/// What was found, at the only time at which it is looked for.
static USERS: OnceLock<Vec<User>> = OnceLock::new();

/// Find out who uses these files, and those of these directories, which somebody has locked. Once, before the process is
/// confined.
pub(super) fn remember_users<'p>(
    files: impl IntoIterator<Item = &'p Path> + Clone,
    directories: impl IntoIterator<Item = &'p Path> + Clone,
) {
    if !may_be_locked(files.clone(), directories.clone()) {
        return;
    }
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let locked: HashSet<u64> = locks.lines().filter_map(locked_inode).collect();
    if locked.is_empty() {
        return;
    }
    let mut wanted: HashSet<Identity> = HashSet::new();
    let mut want = |path: &Path| {
        // Links are followed: the lock is on what they lead to.
        let stat = rustix::fs::stat(path).ok().filter(|stat| locked.contains(&stat.st_ino));
        wanted.extend(stat.map(|stat| Identity::of(&stat)));
    };
    files.into_iter().for_each(&mut want);
    for entry in names_of(directories) {
        if locked.contains(&entry.ino()) || entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
            want(&entry.path());
        }
    }
    if !wanted.is_empty() {
        let _ = USERS.set(users_of(&wanted));
    }
}

/// Whether one of these files, or of those in these directories, is locked, or cannot be asked.
fn may_be_locked<'p>(
    files: impl IntoIterator<Item = &'p Path>,
    directories: impl IntoIterator<Item = &'p Path>,
) -> bool {
    let beside = names_of(directories).map(|entry| entry.path());
    let mut asked = 0;
    files.into_iter().map(Path::to_owned).chain(beside).any(|path| match rustix::fs::stat(&path) {
        Ok(stat) => {
            asked += 1;
            asked > MOST_ASKED || ask(&path, &stat)
        }
        Err(_) => false,
    })
}

/// Whether a file is locked. Only what is regular is opened to be asked: that of a device can have an effect.
fn ask(path: &Path, stat: &Stat) -> bool {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            // Without waiting, for a lease that somebody has on it.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            // Who may not read a file cannot use it for a command, either.
            rustix::fs::open(path, flags, Mode::empty()).is_ok_and(|file| is_locked(&File::from(file)))
        }
        FileType::BlockDevice => true,
        _ => false,
    }
}

/// The names in these directories.
fn names_of<'p>(directories: impl IntoIterator<Item = &'p Path>) -> impl Iterator<Item = fs::DirEntry> {
    let names = directories.into_iter().filter_map(|directory| fs::read_dir(directory).ok());
    let names: Vec<_> = names.collect();
    names.into_iter().flat_map(|names| names.flatten().take(MOST_NAMES))
}

/// The process that has this file open, other than this one, if it was [remembered](remember_users).
pub(super) fn user_of(file: &File) -> Option<&'static User> {
    let identity = Identity::of(&rustix::fs::fstat(file).ok()?);
    USERS.get()?.iter().find(|user| user.file == identity)
}

/// The inode of a line of `/proc/locks` for one of the bytes that QEMU locks: `1: OFDLCK ADVISORY READ -1 08:02:123 100 101`.
fn locked_inode(line: &str) -> Option<u64> {
    // A process that waits for a lock has an arrow there.
    let words: Vec<&str> = line.split_ascii_whitespace().filter(|&word| word != "->").collect();
    let &[_, kind, _, _, _, file, start, end] = words.as_slice() else { return None };
    if !matches!(kind, "OFDLCK" | "POSIX") {
        return None;
    }
    let start: u64 = start.parse().ok()?;
    let end: u64 = if end == "EOF" { u64::MAX } else { end.parse().ok()? };
    if end < *LOCKED.start() || start > *LOCKED.end() {
        return None;
    }
    file.rsplit(':').next()?.parse().ok()
}

/// The processes that have one of these files open.
fn users_of(wanted: &HashSet<Identity>) -> Vec<User> {
    let mut users: Vec<User> = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let number = process.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(number) = number.filter(|&number: &u32| number != std::process::id()) else { continue };
        for descriptor in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            // What is no file has a name without a slash, and files elsewhere may be on a server that does not answer.
            let Ok(target) = fs::read_link(descriptor.path()) else { continue };
            if !target.as_os_str().as_bytes().starts_with(b"/") {
                continue;
            }
            let Ok(stat) = rustix::fs::stat(descriptor.path()) else { continue };
            let file = Identity::of(&stat);
            if wanted.contains(&file) {
                let name = fs::read(process.path().join("comm")).unwrap_or_default();
                users.push(User { file, process: number, name: escape_bytes(name.trim_ascii_end()).to_string() });
            }
        }
    }
    users
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        for (line, inode) in [
            ("1: OFDLCK ADVISORY  READ -1 00:1b:12345 100 101", Some(12345)),
            ("2: POSIX  ADVISORY  WRITE 710 fe:00:77 0 EOF", Some(77)),
            ("2: -> POSIX  ADVISORY  WRITE 710 fe:00:77 201 201", Some(77)),
            ("3: FLOCK  ADVISORY  WRITE 710 fe:00:77 0 EOF", None),
            ("3: OFDLCK ADVISORY  READ -1 fe:00:77 204 300", None),
            ("3: OFDLCK ADVISORY  READ -1 fe:00:77 0 99", None),
            ("nonsense", None),
        ] {
            assert_eq!(locked_inode(line), inode, "{line}");
        }
    }

    #[test]
    fn only_a_locked_file_is_worth_a_search() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, "x").unwrap();
            path
        };
        let (named, base) = (write("named"), write("base"));
        std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        let worth = || may_be_locked([named.as_path()], [dir.path()]);
        assert!(!worth());
        for path in [&named, &base] {
            let user = File::open(path).unwrap();
            crate::devices::lock::lock_read_only(&user).unwrap();
            assert!(worth(), "{path:?}");
        }
        assert!(!worth());
        for number in 0..MOST_ASKED {
            write(&number.to_string());
        }
        assert!(worth());
    }

    #[test]
    fn the_process_that_has_a_file_open_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, "x").unwrap();
        let identity = Identity::of(&rustix::fs::stat(&path).unwrap());
        let wanted = HashSet::from([identity]);
        // Not this process itself.
        let _open = File::open(&path).unwrap();
        assert_eq!(users_of(&wanted), []);
        let mut other =
            std::process::Command::new("sleep").arg("60").stdin(File::open(&path).unwrap()).spawn().unwrap();
        let users = users_of(&wanted);
        other.kill().unwrap();
        other.wait().unwrap();
        let found: Vec<_> = users.iter().map(|user| (user.file, user.process)).collect();
        assert_eq!(found, [(identity, other.id())]);
    }
}
