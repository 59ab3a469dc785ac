//! The errors of commands.

use crate::plugins::{IdentifyError, PluginFailure, Registry};
use instar_guest_abi::ErrorCode;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The advice for a file that exceeds a limit of the process, or of its file system.
pub(crate) const TOO_LONG: &str =
    "the file may not become so long: raise the limit (`ulimit -f`), or move it to a file system \
                                   that holds longer files";

/// The part of a file in a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The image that a command works on, where it has only one.
    Image,
    /// The overlay of a commit.
    Overlay,
    /// A layer between the overlay of a commit and its target.
    Between,
    /// The target of a commit; the image that a new one is backed by.
    Backing,
    /// An image below the target of a commit, or below the one that is looked at.
    Ancestor,
    /// An image above the overlay of a commit that will name the target.
    Child,
    /// A configuration file.
    Configuration,
}

impl Role {
    const ALL: [Self; 7] =
        [Self::Image, Self::Overlay, Self::Between, Self::Backing, Self::Ancestor, Self::Child, Self::Configuration];

    /// Return the role for a word of the JSON.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// Return its word in the JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Overlay => "overlay",
            Self::Between => "between",
            Self::Backing => "backing",
            Self::Ancestor => "ancestor",
            Self::Child => "child",
            Self::Configuration => "configuration",
        }
    }
}

/// Where something went wrong, as far as that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Context {
    path: Option<PathBuf>,
    role: Option<Role>,
    device: Option<u32>,
    offset: Option<u64>,
    errno: Option<i32>,
    step: Option<String>,
    holder: Option<u32>,
}

/// The reason why a command failed: a code, and one line for people that names the file and the remedy. The other fields repeat
/// the content of the line for programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// An `ERROR_*` code.
    pub code: ErrorCode,
    /// One line, safe to print on a terminal.
    pub message: String,
    context: Box<Context>,
}

impl Error {
    /// Make an error from a code and a line. The line is made safe for a terminal; file names in it should still be escaped
    /// with [`escape_path`](crate::escape::escape_path), so that they are unambiguous.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = crate::escape::printable(&message.into()).into_owned();
        Self { code, message, context: Box::default() }
    }

    /// Make the error of an image or another file.
    pub fn image(path: &Path, code: ErrorCode, clause: impl fmt::Display) -> Self {
        Self::new(code, format!("'{}': {clause}", crate::escape::escape_path(path))).at_path(path)
    }

    /// Make the error of a failed system call on a file: `cannot be opened: Permission denied`. The code tells lacking
    /// permissions, read-only files and full disks apart, and is `otherwise` for every other reason.
    pub fn io(path: &Path, otherwise: ErrorCode, what: impl fmt::Display, error: &io::Error) -> Self {
        let code = code_of(error).unwrap_or(otherwise);
        Self::image(path, code, format!("{what}: {}", reason(error))).caused_by(error)
    }

    /// Make the error of an image with an unknown format.
    #[must_use]
    pub fn identify(path: &Path, error: &IdentifyError) -> Self {
        Self::image(path, error.code(), error)
    }

    /// Make the error of a plugin that could not answer about an image.
    #[must_use]
    pub fn plugin(path: &Path, failure: &PluginFailure) -> Self {
        Self::image(path, failure.code(), failure)
    }

    /// Refuse to continue if a plugin directory that the operator named is missing.
    ///
    /// # Errors
    /// [`ErrorCode::PluginUnavailable`].
    pub fn if_refused(plugins: &Registry) -> Result<(), Self> {
        plugins.refused().map_or(Ok(()), |refused| {
            let clause = format!("no plugin is loaded from it: {}", refused.reason);
            Err(Self::image(&refused.path, ErrorCode::PluginUnavailable, clause))
        })
    }

    /// Set the file of the error.
    #[must_use]
    pub fn at_path(mut self, path: &Path) -> Self {
        self.context.path = Some(path.to_owned());
        self
    }

    /// Set the role of the file, unless the error has one.
    #[must_use]
    pub fn in_role(mut self, role: Role) -> Self {
        self.context.role.get_or_insert(role);
        self
    }

    /// Replace the role of the file.
    #[must_use]
    pub fn with_role(mut self, role: Option<Role>) -> Self {
        self.context.role = role;
        self
    }

    /// Set the role of the file in a command on the image `given`: any other file has the role `below`.
    #[must_use]
    pub fn of_image(self, given: &Path, below: Option<Role>) -> Self {
        match self.path().map(|path| path == given) {
            Some(true) => self.in_role(Role::Image),
            Some(false) => below.into_iter().fold(self, Self::in_role),
            None => self,
        }
    }

    /// Set the guest's device, and the byte offset on it.
    #[must_use]
    pub fn on_device(mut self, device: Option<u32>, offset: Option<u64>) -> Self {
        (self.context.device, self.context.offset) = (device, offset);
        self
    }

    /// Set the errno of the system call that failed.
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.context.errno = (errno > 0).then_some(errno);
        self
    }

    /// Take over the errno of the cause, if it has one.
    #[must_use]
    pub fn caused_by(self, error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        self.with_errno(errno)
    }

    /// Set the step of the operation.
    #[must_use]
    pub fn in_step(mut self, step: &str) -> Self {
        self.context.step = (!step.is_empty()).then(|| step.to_owned());
        self
    }

    /// Set the number of the process that holds the file.
    #[must_use]
    pub fn held_by(mut self, process: Option<u32>) -> Self {
        self.context.holder = process;
        self
    }

    /// Append the state of the files to the line.
    #[must_use]
    pub fn in_state(mut self, state: &str) -> Self {
        self.message = crate::escape::printable(&format!("{}; {state}", self.message)).into_owned();
        self
    }

    /// Return the file concerned.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.context.path.as_deref()
    }

    /// Return the role of that file.
    #[must_use]
    pub fn role(&self) -> Option<Role> {
        self.context.role
    }

    /// Return the number of the guest's device that the file was.
    #[must_use]
    pub fn device(&self) -> Option<u32> {
        self.context.device
    }

    /// Return the byte offset in that file.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.context.offset
    }

    /// Return the errno of the system call that failed.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.context.errno
    }

    /// Return the number of the process that holds the file, as far as the system tells that.
    #[must_use]
    pub fn holder(&self) -> Option<u32> {
        self.context.holder
    }

    /// Return the step of the operation: for a commit "check", "plan", "write" or "empty".
    #[must_use]
    pub fn step(&self) -> Option<&str> {
        self.context.step.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Return the system's text for an error, without the number that Rust appends. A limit of open files is no fault of the file
/// that was to be opened, so the text says how to raise it.
#[must_use]
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    match error.raw_os_error() {
        Some(libc::EMFILE) => format!("{text}: raise this process's limit with `ulimit -n`"),
        Some(libc::ENFILE) => format!("{text}: raise the system's limit with `sysctl fs.file-max`"),
        _ => text.to_owned(),
    }
}

/// Whether an error says that no more files can be opened, which says nothing of the file that was to be opened.
#[must_use]
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// The code of an error of the system that every command tells apart from the others.
fn code_of(error: &io::Error) -> Option<ErrorCode> {
    match error.raw_os_error()? {
        libc::EACCES | libc::EPERM => Some(ErrorCode::PermissionDenied),
        libc::EROFS => Some(ErrorCode::ReadOnly),
        libc::ENOSPC | libc::EDQUOT => Some(ErrorCode::NoSpace),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_system_keeps_what_it_was() {
        for (errno, code, words) in [
            (libc::EACCES, ErrorCode::PermissionDenied, "Permission denied"),
            (libc::EROFS, ErrorCode::ReadOnly, "Read-only file system"),
            (libc::ENOSPC, ErrorCode::NoSpace, "No space left on device"),
            (libc::EIO, ErrorCode::OpenFailed, "Input/output error"),
            (libc::EMFILE, ErrorCode::OpenFailed, "Too many open files: raise this process's limit with `ulimit -n`"),
        ] {
            let cause = io::Error::from_raw_os_error(errno);
            let error = Error::io(Path::new("a\nb"), ErrorCode::OpenFailed, "cannot be opened", &cause);
            assert_eq!((error.code, error.errno()), (code, Some(errno)));
            assert_eq!(error.message, format!("'a\\x0ab': cannot be opened: {words}"));
            assert_eq!(error.path(), Some(Path::new("a\nb")));
        }
    }

    #[test]
    fn the_first_role_is_the_right_one() {
        let error = Error::new(ErrorCode::OpenFailed, "x").in_role(Role::Ancestor).in_role(Role::Backing);
        assert_eq!(error.role(), Some(Role::Ancestor));
    }
}
