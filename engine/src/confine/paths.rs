//! Landlock: which files can be opened from now on, by where they are.
//!
//! A rule names a file, or a directory with everything beneath it, by an open descriptor: what a rule was made for is what
//! it allows, wherever its name leads later. Rules allow reading and writing of existing files and nothing else; what
//! the kernel's Landlock can deny besides is denied: executing, listing directories, creating, removing, renaming,
//! network, signals to other processes. Files that are open already stay as they are.

use landlock::{
    Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, ABI,
};
use std::path::PathBuf;

/// The newest Landlock whose rights are known here. An older kernel denies what it can.
const NEWEST: ABI = ABI::V10;

/// The files that can be opened: none, unless they are named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Reach {
    /// This file, or what is beneath this directory, can be opened for reading. Links are followed now. What is not there
    /// is passed over.
    #[must_use]
    pub fn read(mut self, path: impl Into<PathBuf>) -> Self {
        self.read.push(path.into());
        self
    }

    /// The same for reading and writing.
    #[must_use]
    pub fn write(mut self, path: impl Into<PathBuf>) -> Self {
        self.write.push(path.into());
        self
    }

    fn rules(&self) -> impl Iterator<Item = (&PathBuf, BitFlags<AccessFs>)> {
        // Changing the length counts for a descriptor as it was when that was opened.
        let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        let read = self.read.iter().map(|path| (path, AccessFs::ReadFile.into()));
        read.chain(self.write.iter().map(move |path| (path, write)))
    }
}

/// Restrict the calling thread, and threads that it starts later, to these files. Returns what is in force.
///
/// # Errors
/// Why nothing is: one clause.
pub fn restrict(reach: &Reach) -> Result<String, String> {
    let status = enforce(reach).map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Err("it is switched off in this kernel".into()),
        (RulesetStatus::NotEnforced, _) => Err("this kernel or container has none".into()),
        (_, LandlockStatus::Available { effective_abi, .. }) => Ok(describe(effective_abi)),
        (_, _) => Ok("Landlock: paths".into()),
    }
}

fn enforce(reach: &Reach) -> Result<RestrictionStatus, RulesetError> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (path, access) in reach.rules() {
        // What cannot be opened even so needs no rule: opening it will say why.
        let Ok(descriptor) = PathFd::new(path) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(descriptor, access))?;
    }
    ruleset.restrict_self()
}

/// What a Landlock of this version denies.
fn describe(abi: ABI) -> String {
    let parts = [(ABI::V1, "paths"), (ABI::V4, "network"), (ABI::V6, "signals")];
    let denied: Vec<&str> = parts.into_iter().filter(|(since, _)| abi >= *since).map(|(_, what)| what).collect();
    format!("Landlock ABI {abi}: {}", denied.join(", "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::{self, File, OpenOptions};
    use std::io::ErrorKind::PermissionDenied;

    /// Landlock restricts one thread: one that ends with the test.
    fn restricted(reach: &Reach, test: impl FnOnce() + Send) {
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
        let reach = Reach::default().read(path("read")).write(path("write")).write(path("absent"));
        let write = |name: &str| OpenOptions::new().read(true).write(true).open(path(name));
        restricted(&reach, || {
            let denied = |error: std::io::Error| assert_eq!(error.kind(), PermissionDenied);
            File::open(path("read/file")).unwrap();
            denied(write("read/file").unwrap_err());
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
    fn single_files_and_what_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["one", "two"] {
            fs::write(path(name), name).unwrap();
        }
        std::os::unix::fs::symlink("one", path("link")).unwrap();
        let open = OpenOptions::new().write(true).open(path("two")).unwrap();
        restricted(&Reach::default().write(path("link")), || {
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
        assert_eq!(describe(ABI::V1), "Landlock ABI 1: paths");
        assert_eq!(describe(ABI::V5), "Landlock ABI 5: paths, network");
        assert_eq!(describe(ABI::V7), "Landlock ABI 7: paths, network, signals");
    }
}
