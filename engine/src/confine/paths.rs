//! Landlock: which files can be opened from now on, by where they are.
//!
//! A rule names a file, or a directory with everything beneath it, by an open descriptor: what a rule was made for is what
//! it allows, wherever its name leads later. Rules allow reading and writing of existing files, to an operation that looks for
//! images listing of directories, to one that makes an image giving it its name, to one that deletes an image removing its name,
//! and nothing else; what the kernel's Landlock can deny besides is denied: executing, creating, removing, renaming, network,
//! signals to other processes. Files that are open already stay as they are.

use landlock::{
    Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, ABI,
};
use rustix::fs::{fstat, openat, FileType, Mode, OFlags};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};

/// The newest Landlock whose rights are known here. An older kernel denies what it can.
const NEWEST: ABI = ABI::V10;

/// The files that can be opened: none, unless they are added.
#[derive(Clone, Debug, Default)]
pub struct Reach<'a> {
    rules: Vec<Rule<'a>>,
    /// Signals to processes outside are not Landlock's to deny.
    signals: bool,
    /// Which names there are in its directories can be found out.
    lists: bool,
}

/// A file or directory, and whether it may be written.
#[derive(Clone, Debug)]
struct Rule<'a> {
    at: BorrowedFd<'a>,
    /// An entry of the directory instead of all of it.
    entry: Option<&'a OsStr>,
    write: bool,
    /// What may be done to names in the directory; then nothing else is allowed by this rule.
    names: Option<Names>,
}

/// What may be done to names.
#[derive(Clone, Copy, Debug)]
enum Names {
    MadeAndRemoved,
    Removed,
}

impl<'a> Reach<'a> {
    /// This file, or what is beneath this directory, can be opened for reading, and, if wanted, for writing. Its descriptor
    /// needs to do no more than name it.
    #[must_use]
    pub fn add(mut self, place: &'a impl AsFd, write: bool) -> Self {
        self.rules.push(Rule { at: place.as_fd(), entry: None, write, names: None });
        self
    }

    /// Files may get names in this directory and those beneath it, and lose them; what can be opened there, other rules say.
    #[must_use]
    pub fn add_names(mut self, directory: &'a impl AsFd) -> Self {
        self.rules.push(Rule { at: directory.as_fd(), entry: None, write: false, names: Some(Names::MadeAndRemoved) });
        self
    }

    /// Files may lose their names in this directory and those beneath it.
    #[must_use]
    pub fn add_removal(mut self, directory: &'a impl AsFd) -> Self {
        self.rules.push(Rule { at: directory.as_fd(), entry: None, write: false, names: Some(Names::Removed) });
        self
    }

    /// Signals may be sent to processes outside, as far as the filter of system calls lets them through.
    #[must_use]
    pub fn with_signals(mut self, signals: bool) -> Self {
        self.signals |= signals;
        self
    }

    /// The directories that were added, and those beneath them, can be listed.
    #[must_use]
    pub fn with_listing(mut self, lists: bool) -> Self {
        self.lists |= lists;
        self
    }

    /// The same for one file of a directory. If it is a link, the link is not followed, and nothing can be opened by it.
    #[must_use]
    pub fn add_entry(mut self, directory: &'a impl AsFd, name: &'a OsStr, write: bool) -> Self {
        self.rules.push(Rule { at: directory.as_fd(), entry: Some(name), write, names: None });
        self
    }
}

/// Restrict the calling thread, and threads that it starts later, to these files. Returns what is in force.
///
/// # Errors
/// Why nothing is: one clause.
pub fn restrict(reach: &Reach<'_>) -> Result<String, String> {
    let status = enforce(reach).map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Err("it is switched off in this kernel".into()),
        (RulesetStatus::NotEnforced, _) => Err("this kernel or container has none".into()),
        (_, LandlockStatus::Available { effective_abi, .. }) => Ok(describe(effective_abi, reach.signals)),
        (_, _) => Ok("Landlock: paths".into()),
    }
}

fn enforce(reach: &Reach<'_>) -> Result<RestrictionStatus, RulesetError> {
    let mut scopes = Scope::from_all(NEWEST);
    if reach.signals {
        scopes.remove(Scope::Signal);
    }
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(scopes)?
        .create()?;
    for Rule { at, entry, write, names } in &reach.rules {
        if let Some(names) = names {
            let access = match names {
                Names::MadeAndRemoved => AccessFs::MakeReg | AccessFs::RemoveFile,
                Names::Removed => AccessFs::RemoveFile.into(),
            };
            ruleset = ruleset.add_rule(PathBeneath::new(at, access))?;
            continue;
        }
        // A block device is asked whether it is read-only; which requests there are is the filter's to say.
        let read = AccessFs::ReadFile | AccessFs::IoctlDev;
        // Changing the length counts for a descriptor as it was when that was opened.
        let access = if *write { read | AccessFs::WriteFile | AccessFs::Truncate } else { read };
        let Some(name) = entry else {
            let lists = reach.lists && is_directory(*at);
            let access = if lists { access | AccessFs::ReadDir } else { access };
            ruleset = ruleset.add_rule(PathBeneath::new(at, access))?;
            continue;
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // What is gone meanwhile needs no rule: opening it will say so.
        let Ok(entry) = openat(at, *name, flags, Mode::empty()) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(entry, access))?;
    }
    ruleset.restrict_self()
}

/// Whether this is a directory. The right to list is none of a file's.
fn is_directory(place: BorrowedFd<'_>) -> bool {
    fstat(place).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// What a Landlock of this version denies.
fn describe(abi: ABI, signals: bool) -> String {
    let parts = [(ABI::V1, true, "paths"), (ABI::V4, true, "network"), (ABI::V6, !signals, "signals")];
    let parts = parts.into_iter().filter(|(since, wanted, _)| *wanted && abi >= *since);
    let denied: Vec<&str> = parts.map(|(_, _, what)| what).collect();
    format!("Landlock ABI {abi}: {}", denied.join(", "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::{self, File, OpenOptions};
    use std::io::ErrorKind::PermissionDenied;

    /// Landlock restricts one thread: one that ends with the test.
    fn restricted(reach: &Reach<'_>, test: impl FnOnce() + Send) {
        let confined = || match restrict(reach) {
            Ok(_) => test(),
            Err(why) => eprintln!("not tested: {why}"),
        };
        std::thread::scope(|scope| scope.spawn(confined).join().unwrap());
    }

    #[test]
    fn only_what_was_named_can_be_opened_and_only_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["read", "write", "other"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), name).unwrap();
        }
        std::os::unix::fs::symlink("../other/file", path("write").join("link")).unwrap();
        let (read, write) = (File::open(path("read")).unwrap(), File::open(path("write")).unwrap());
        let reach = Reach::default().add(&read, false).add(&write, true);
        // What takes the name of a directory later is another one.
        fs::rename(path("read"), path("moved")).unwrap();
        fs::create_dir(path("read")).unwrap();
        fs::write(path("read/file"), "another").unwrap();
        let write = |name: &str| OpenOptions::new().read(true).write(true).open(path(name));
        restricted(&reach, || {
            let denied = |error: std::io::Error| assert_eq!(error.kind(), PermissionDenied);
            File::open(path("moved/file")).unwrap();
            denied(write("moved/file").unwrap_err());
            denied(File::open(path("read/file")).unwrap_err());
            write("write/file").unwrap().set_len(1).unwrap();
            denied(write("write/link").unwrap_err());
            denied(File::open(path("other/file")).unwrap_err());
            denied(File::open("/etc/passwd").unwrap_err());
            denied(File::create(path("write/new")).unwrap_err());
            denied(fs::create_dir(path("write/new")).unwrap_err());
            denied(fs::remove_file(path("write/file")).unwrap_err());
            denied(fs::rename(path("write/file"), path("write/new")).unwrap_err());
            denied(fs::read_dir(path("write")).unwrap_err());
            // What is not there is said to be not there.
            assert_eq!(File::open(path("other/absent")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
        });
        assert_eq!(fs::read(path("write/file")).unwrap(), b"w");
    }

    #[test]
    fn a_name_can_be_given_in_one_directory() {
        use rustix::fs::{linkat, renameat, AtFlags, CWD};
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["in", "out"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("out/file"), "").unwrap();
        let open = |name: &str| File::open(path(name)).unwrap();
        let (within, outside) = (open("in"), open("out"));
        let flags = OFlags::TMPFILE | OFlags::RDWR;
        let Ok(unnamed) = openat(&within, ".", flags, Mode::from_raw_mode(0o644)) else { return };
        let link = format!("/proc/self/fd/{}", unnamed.as_raw_fd());
        let give = |directory: &File, name: &str| linkat(CWD, &link, directory, name, AtFlags::SYMLINK_FOLLOW);
        let reach = Reach::default().add_names(&within);
        restricted(&reach.clone(), || {
            give(&within, "one").unwrap();
            // A second step does not take it away, if it says so, too.
            restrict(&reach).unwrap();
            give(&within, "two").unwrap();
            renameat(&within, "two", &within, "one").unwrap();
            fs::remove_file(path("in/one")).unwrap();
            assert!(give(&outside, "one").is_err());
            assert_eq!(fs::remove_file(path("out/file")).unwrap_err().kind(), PermissionDenied);
            assert_eq!(File::open(path("in/one")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
            assert_eq!(fs::create_dir(path("in/new")).unwrap_err().kind(), PermissionDenied);
        });
    }

    #[test]
    fn a_name_can_be_removed_in_one_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["in", "out"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), "").unwrap();
        }
        let within = File::open(path("in")).unwrap();
        let reach = Reach::default().add_removal(&within);
        restricted(&reach.clone(), || {
            restrict(&reach).unwrap();
            assert_eq!(File::create(path("in/new")).unwrap_err().kind(), PermissionDenied);
            assert_eq!(fs::remove_file(path("out/file")).unwrap_err().kind(), PermissionDenied);
            assert_eq!(fs::remove_dir(path("out")).unwrap_err().kind(), PermissionDenied);
            assert_eq!(File::open(path("in/file")).unwrap_err().kind(), PermissionDenied);
            assert!(fs::rename(path("in/file"), path("in/other")).is_err());
            fs::remove_file(path("in/file")).unwrap();
        });
    }

    #[test]
    fn what_may_be_listed_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("in/deep")).unwrap();
        fs::create_dir(path("out")).unwrap();
        fs::write(path("in/file"), "").unwrap();
        let (within, file) = (File::open(path("in")).unwrap(), File::open(path("in/file")).unwrap());
        let reach = Reach::default().add(&within, false).add(&file, true);
        restricted(&reach.clone().with_listing(false), || {
            assert_eq!(fs::read_dir(path("in")).unwrap_err().kind(), PermissionDenied);
        });
        restricted(&reach.with_listing(true), || {
            assert_eq!(fs::read_dir(path("in")).unwrap().count(), 2);
            assert_eq!(fs::read_dir(path("in/deep")).unwrap().count(), 0);
            assert_eq!(fs::read_dir(path("out")).unwrap_err().kind(), PermissionDenied);
            OpenOptions::new().write(true).open(path("in/file")).unwrap();
            restrict(&Reach::default()).unwrap();
            assert_eq!(fs::read_dir(path("in")).unwrap_err().kind(), PermissionDenied);
        });
    }

    #[test]
    fn single_files_and_what_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["one", "two"] {
            fs::write(path(name), name).unwrap();
        }
        let link = path("link");
        std::os::unix::fs::symlink("one", &link).unwrap();
        let open = OpenOptions::new().write(true).open(path("two")).unwrap();
        let (directory, one) = (File::open(dir.path()).unwrap(), File::open(&link).unwrap());
        let reach = Reach::default().add(&one, true);
        let reach = reach.add_entry(&directory, OsStr::new("absent"), true);
        restricted(&reach, || {
            let write = |name: &str| OpenOptions::new().read(true).write(true).open(path(name));
            write("one").unwrap();
            let file = write("link").unwrap();
            assert_eq!(write("two").unwrap_err().kind(), PermissionDenied);
            open.set_len(0).unwrap();
            // The second step: nothing can be opened, and what is open can still be changed.
            restrict(&Reach::default()).unwrap();
            assert_eq!(write("one").unwrap_err().kind(), PermissionDenied);
            file.set_len(0).unwrap();
        });
    }

    #[test]
    fn old_kernels_deny_less_and_say_so() {
        assert_eq!(describe(ABI::V1, false), "Landlock ABI 1: paths");
        assert_eq!(describe(ABI::V5, false), "Landlock ABI 5: paths, network");
        assert_eq!(describe(ABI::V7, false), "Landlock ABI 7: paths, network, signals");
        assert_eq!(describe(ABI::V7, true), "Landlock ABI 7: paths, network");
    }
}
