//! The settings of the operator for all runs, and the origin of each value.
//!
//! Two files, the system's and the user's; the directories that both name add up, and the user's sandbox wins. Like plugins, a file counts only if nobody but root and
//! the caller can change it: it decides which files may be written, and which code is loaded.

mod file;

use crate::error::{Error, Role};
use crate::plugins::is_elevated;
use crate::sandbox::SandboxChoice;
use file::Content;
use instar_guest_abi::ErrorCode;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The system's file.
const SYSTEM_FILE: &str = "/etc/instar/config.toml";
/// The user's file, below `$XDG_CONFIG_HOME` or `~/.config`.
const USER_FILE: &str = "instar/config.toml";
/// The environment variable that names a file instead of both; empty: none.
pub const CONFIG_VARIABLE: &str = "INSTAR_CONFIG";

/// A directory that a file names, and that file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configured {
    /// An absolute path.
    pub directory: PathBuf,
    /// The file that names it.
    pub file: PathBuf,
}

/// The combined content of the configuration files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `allow-backing-dirs`: where recorded backings may lie, besides the overlay's own directory.
    pub backing_directories: Vec<Configured>,
    /// `plugin-dirs`: more directories with plugins.
    pub plugin_directories: Vec<Configured>,
    /// `undo-dir`: where the undo logs of block devices lie, as the last file that names one has it.
    pub undo_directory: Option<Configured>,
    /// `sandbox`, as the last file that names one has it, and that file.
    pub sandbox: Option<(SandboxChoice, PathBuf)>,
    /// The files that were looked for, and whether each exists.
    pub files: Vec<(PathBuf, bool)>,
    /// Reasons why files were ignored, in one line each that names the file.
    pub warnings: Vec<String>,
}

/// A file to look for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    path: PathBuf,
    origin: Origin,
}

/// How a file came to be looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It is the system's.
    System,
    /// The environment names it: it has to be there.
    Named,
    /// Found through the environment of the user who logged in, who may not be the caller.
    Found,
}

impl Config {
    /// Read the files. A missing file is no error; a user's file that belongs to another user (`HOME` under `sudo -u`) is
    /// ignored with a warning.
    ///
    /// # Errors
    /// A file that others can change, that cannot be read, or that says something else than it may: one line that names
    /// file, line and key.
    pub fn load() -> Result<Self, Error> {
        Self::of(&files(is_elevated(), |name| std::env::var_os(name).map(PathBuf::from)))
    }

    fn of(files: &[Source]) -> Result<Self, Error> {
        let mut config = Self::default();
        for Source { path: file, origin } in files {
            let content = match Content::read(file) {
                Err(error) if *origin == Origin::Found && is_anothers(file) => {
                    config.warnings.push(format!(
                        "{error}: the file is ignored, because it is another user's: set HOME to a directory of \
                         yours (`sudo -H`)"
                    ));
                    None
                }
                content => content?,
            };
            let Some(content) = content else {
                if *origin == Origin::Named {
                    let clause =
                        format!("does not exist, and {CONFIG_VARIABLE} names it: correct it, or set it to nothing");
                    return Err(Error::image(file, ErrorCode::OpenFailed, clause).in_role(Role::Configuration));
                }
                config.files.push((file.clone(), false));
                continue;
            };
            let named = |directories: Vec<PathBuf>| {
                directories.into_iter().map(|directory| Configured { directory, file: file.clone() })
            };
            config.undo_directory = named(content.undo_dir.into_iter().collect()).next().or(config.undo_directory);
            config.backing_directories.extend(named(content.allow_backing_dirs));
            config.plugin_directories.extend(named(content.plugin_dirs));
            config.sandbox = content.sandbox.map(|sandbox| (sandbox, file.clone())).or(config.sandbox);
            config.files.push((file.clone(), true));
        }
        Ok(config)
    }

    /// Return the sandbox, if a file names one.
    #[must_use]
    pub fn sandbox(&self) -> Option<SandboxChoice> {
        self.sandbox.as_ref().map(|(sandbox, _)| *sandbox)
    }

    /// Return the directories with plugins, in their order.
    #[must_use]
    pub fn plugin_paths(&self) -> Vec<PathBuf> {
        self.plugin_directories.iter().map(|configured| configured.directory.clone()).collect()
    }

    /// Return the directory of the undo logs of block devices, if a file names one that exists.
    #[must_use]
    pub fn undo_path(&self) -> Option<PathBuf> {
        self.undo_directory.as_ref().map(|configured| configured.directory.clone()).filter(|path| path.is_dir())
    }

    /// Return the existing directories in which recorded backings may lie.
    #[must_use]
    pub fn backing_paths(&self) -> Vec<PathBuf> {
        let directories = self.backing_directories.iter().map(|configured| configured.directory.clone());
        directories.filter(|directory| directory.is_dir()).collect()
    }
}

/// Whether a file, or a directory on the way to it, belongs to somebody else than root and the caller, or is closed to them.
fn is_anothers(file: &Path) -> bool {
    let caller = rustix::process::geteuid().as_raw();
    file.ancestors().any(|path| match path.symlink_metadata() {
        Ok(metadata) => ![0, caller].contains(&metadata.uid()),
        Err(error) => error.kind() == std::io::ErrorKind::PermissionDenied,
    })
}

/// The files to look for. A program that runs with more rights than its caller has goes by the system's file alone.
fn files(elevated: bool, variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<Source> {
    let system = Source { path: PathBuf::from(SYSTEM_FILE), origin: Origin::System };
    if elevated {
        return vec![system];
    }
    if let Some(path) = variable(CONFIG_VARIABLE) {
        return if path.as_os_str().is_empty() { Vec::new() } else { vec![Source { path, origin: Origin::Named }] };
    }
    let absolute = |path: &PathBuf| path.is_absolute();
    let home = || variable("HOME").filter(absolute).map(|home| home.join(".config"));
    let user = variable("XDG_CONFIG_HOME").filter(absolute).or_else(home);
    let user = user.map(|directory| Source { path: directory.join(USER_FILE), origin: Origin::Found });
    std::iter::once(system).chain(user).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn shown(elevated: bool, variables: &[(&str, &str)]) -> Vec<String> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value));
        files(elevated, variable).iter().map(|file| file.path.display().to_string()).collect()
    }

    #[test]
    fn which_files() {
        assert_eq!(shown(false, &[]), [SYSTEM_FILE]);
        assert_eq!(shown(false, &[("HOME", "/no/u")]), [SYSTEM_FILE, "/no/u/.config/instar/config.toml"]);
        let both = [("HOME", "/no/u"), ("XDG_CONFIG_HOME", "/no/x")];
        assert_eq!(shown(false, &both), [SYSTEM_FILE, "/no/x/instar/config.toml"]);
        assert_eq!(shown(false, &[("HOME", "relative")]), [SYSTEM_FILE]);
        assert_eq!(shown(false, &[("HOME", "/no/u"), (CONFIG_VARIABLE, "/no/c")]), ["/no/c"]);
        assert_eq!(shown(false, &[("HOME", "/no/u"), (CONFIG_VARIABLE, "")]), Vec::<String>::new());
        assert_eq!(shown(true, &[("HOME", "/no/u"), (CONFIG_VARIABLE, "/no/c")]), [SYSTEM_FILE]);
    }

    #[test]
    fn what_files_name_adds_up() {
        let root = tempfile::tempdir().unwrap();
        let (first, second) = (root.path().join("first"), root.path().join("second"));
        std::fs::write(&first, "plugin-dirs = [\"/no/a\"]\nallow-backing-dirs = [\"/\"]\nsandbox = \"process\"\n")
            .unwrap();
        std::fs::write(&second, "plugin-dirs = [\"/no/b\", \"/no/c\"]\nsandbox = \"auto\"\nundo-dir = \"/\"\n")
            .unwrap();
        for file in [&first, &second] {
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644)).unwrap();
        }
        let absent = root.path().join("absent");
        let source = |path: &PathBuf| Source { path: path.clone(), origin: Origin::System };
        let config = Config::of(&[&first, &absent, &second].map(source)).unwrap();
        assert_eq!(config.plugin_paths(), ["/no/a", "/no/b", "/no/c"].map(PathBuf::from));
        assert_eq!(config.backing_paths(), [PathBuf::from("/")]);
        assert_eq!(config.undo_path(), Some(PathBuf::from("/")));
        assert_eq!(config.plugin_directories.first().unwrap().file, first);
        assert_eq!(config.sandbox, Some((SandboxChoice::Auto, second.clone())));
        assert_eq!(config.files, [(first, true), (absent, false), (second, true)]);
    }
}
