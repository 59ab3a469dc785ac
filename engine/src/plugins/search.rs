//! The search path for plugins.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Names of plugin libraries begin with this.
pub const FILE_PREFIX: &str = "libinstar_plugin_";
/// Names of plugin libraries end with this.
pub const FILE_SUFFIX: &str = ".so";
/// Directory of distribution packages, below `lib` of the installation prefix.
const TRIPLET: &str = "x86_64-linux-gnu";
/// The environment variable that names more directories, separated by colons.
pub const PATH_VARIABLE: &str = "INSTAR_PLUGIN_PATH";

/// Directories in the order of their precedence. A library hides libraries of the same file name in later directories.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SearchPath {
    directories: Vec<PathBuf>,
    requested: Vec<PathBuf>,
    environment: Vec<PathBuf>,
}

/// Whether the program runs with more rights than its caller, so that the environment must be ignored.
#[must_use]
pub fn is_elevated() -> bool {
    // AT_SECURE is what the dynamic loader goes by for LD_LIBRARY_PATH.
    // SAFETY: `getauxval` reads a value that the kernel passed at the start of the process.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// The file of this program where procfs is missing, which `current_exe` reads: the name by which it was executed
/// (`AT_EXECFN` of getauxval(3)), which counts as long as the working directory is the one at the start. As an environment
/// variable, it is the caller's choice.
fn executed() -> Option<PathBuf> {
    if is_elevated() {
        return None;
    }
    // SAFETY: the kernel passed the address of a string that lives as long as the process, or nothing, which is 0.
    let name = unsafe {
        let name = libc::getauxval(libc::AT_EXECFN) as *const libc::c_char;
        (!name.is_null()).then(|| CStr::from_ptr(name))
    };
    std::fs::canonicalize(OsStr::from_bytes(name?.to_bytes())).ok()
}

impl SearchPath {
    /// Make a path of exactly these directories.
    #[must_use]
    pub fn of(directories: Vec<PathBuf>) -> Self {
        Self { requested: directories.clone(), directories, environment: Vec::new() }
    }

    /// Make a path of exactly these directories, of which the operator asked for the `requested` ones.
    #[must_use]
    pub fn with_requested(directories: Vec<PathBuf>, requested: Vec<PathBuf>) -> Self {
        Self { directories, requested, environment: Vec::new() }
    }

    /// The directories that the operator asked for.
    #[must_use]
    pub fn requested(&self) -> &[PathBuf] {
        &self.requested
    }

    /// The directories of this process: those of `--plugin-dir` in their order, those of `INSTAR_PLUGIN_PATH`, those of the
    /// configuration, then the built-in ones. The environment variable is not honored in a set-user-ID or set-group-ID
    /// program.
    #[must_use]
    pub fn for_process(plugin_dirs: &[PathBuf], configured: &[PathBuf]) -> Self {
        let variable = if is_elevated() { None } else { std::env::var_os(PATH_VARIABLE) };
        let executable = std::env::current_exe().ok().or_else(executed);
        Self::assemble(plugin_dirs, variable.as_deref(), configured, executable.as_deref())
    }

    fn assemble(
        plugin_dirs: &[PathBuf],
        variable: Option<&OsStr>,
        configured: &[PathBuf],
        executable: Option<&Path>,
    ) -> Self {
        // An empty element means the current directory to some programs; here it means nothing. The same goes for
        // relative ones: what they name depends on where the program happens to be started.
        let variable = variable.map(std::env::split_paths).into_iter().flatten();
        let environment: Vec<PathBuf> = variable.filter(|path| path.is_absolute()).collect();
        let mut directories = [plugin_dirs, &environment, configured].concat();
        if let Some(directory) = executable.and_then(Path::parent) {
            directories.push(directory.to_owned());
            if let Some(prefix) = directory.parent() {
                directories.push(prefix.join("lib").join(TRIPLET).join("instar/plugins"));
                directories.push(prefix.join("lib64/instar/plugins"));
                directories.push(prefix.join("lib/instar/plugins"));
            }
        }
        directories.push(Path::new("/usr/lib").join(TRIPLET).join("instar/plugins"));
        directories.push(PathBuf::from("/usr/lib64/instar/plugins"));
        directories.push(PathBuf::from("/usr/lib/instar/plugins"));
        let mut seen = std::collections::HashSet::new();
        directories.retain(|directory| seen.insert(directory.clone()));
        Self { directories, requested: plugin_dirs.to_vec(), environment }
    }

    /// Whether the operator asked for this directory, so that its absence deserves a message.
    #[must_use]
    pub fn is_requested(&self, directory: &Path) -> bool {
        self.requested.iter().any(|requested| requested == directory)
    }

    /// Whether `INSTAR_PLUGIN_PATH` names this directory.
    #[must_use]
    pub fn is_from_environment(&self, directory: &Path) -> bool {
        self.environment.iter().any(|named| named == directory)
    }

    /// The directories in their order.
    #[must_use]
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }
}

/// Whether a file of this name is looked at.
#[must_use]
pub fn is_plugin_name(name: &str) -> bool {
    name.strip_prefix(FILE_PREFIX).and_then(|rest| rest.strip_suffix(FILE_SUFFIX)).is_some_and(|stem| !stem.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_comes_first_and_the_system_last() {
        let path = SearchPath::assemble(
            &[PathBuf::from("mine")],
            Some(OsStr::new("/a:/b::relative")),
            &[PathBuf::from("/configured")],
            Some(Path::new("/usr/bin/instar")),
        );
        let shown: Vec<_> = path.directories().iter().map(|d| d.display().to_string()).collect();
        assert_eq!(
            shown,
            [
                "mine",
                "/a",
                "/b",
                "/configured",
                "/usr/bin",
                "/usr/lib/x86_64-linux-gnu/instar/plugins",
                "/usr/lib64/instar/plugins",
                "/usr/lib/instar/plugins"
            ]
        );
    }

    #[test]
    fn the_program_is_found_without_procfs() {
        assert_eq!(executed(), std::env::current_exe().ok());
    }

    #[test]
    fn names() {
        assert!(is_plugin_name("libinstar_plugin_qcow2.so"));
        for other in ["libinstar_plugin_.so", "libinstar_plugin_qcow2.so.1", "instar_plugin_x.so", "libm.so"] {
            assert!(!is_plugin_name(other), "{other}");
        }
    }
}
