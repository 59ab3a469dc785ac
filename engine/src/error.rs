//! How a command fails.

use crate::plugins::{IdentifyError, PluginFailure, Registry};
use instar_guest_abi::ErrorCode;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Which part a file has in a command.
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
    /// An image above the overlay of a commit, which is to name the target.
    Child,
    /// A configuration file.
    Configuration,
}

impl Role {
    const ALL: [Self; 7] =
        [Self::Image, Self::Overlay, Self::Between, Self::Backing, Self::Ancestor, Self::Child, Self::Configuration];

    /// The role that JSON has this word for.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// The word that JSON has for it.
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
}

/// Why a command failed: a code, and one line for people that names the file and what to do. The context is for programs:
/// the line says it already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// An `ERROR_*` code.
    pub code: ErrorCode,
    /// One line, safe to print on a terminal.
    pub message: String,
    context: Box<Context>,
}

impl Error {
    /// An error with a code and a line. The line is made safe for a terminal; escape file names in it with
    /// [`escape_path`](crate::escape::escape_path) all the same, so that they are unambiguous.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = crate::escape::printable(&message.into()).into_owned();
        Self { code, message, context: Box::default() }
    }

    /// What went wrong with an image, or another file.
    pub fn image(path: &Path, code: ErrorCode, clause: impl fmt::Display) -> Self {
        Self::new(code, format!("'{}': {clause}", crate::escape::escape_path(path))).at_path(path)
    }

    /// A system call on a file failed: `cannot be opened: Permission denied`. The code tells what every command tells apart
    /// (a permission that is lacking, what is read-only, a full disk), and is `otherwise` for the rest.
    pub fn io(path: &Path, otherwise: ErrorCode, what: impl fmt::Display, error: &io::Error) -> Self {
        let code = code_of(error).unwrap_or(otherwise);
        Self::image(path, code, format!("{what}: {}", reason(error))).caused_by(error)
    }

    /// Why the format of an image is not known.
    #[must_use]
    pub fn identify(path: &Path, error: &IdentifyError) -> Self {
        Self::image(path, error.code(), error)
    }

    /// Why a plugin gave no answer about an image.
    #[must_use]
    pub fn plugin(path: &Path, failure: &PluginFailure) -> Self {
        Self::image(path, failure.code(), failure)
    }

    /// Refuse plugins of which a directory that the operator named is missing.
    ///
    /// # Errors
    /// [`ErrorCode::PluginUnavailable`].
    pub fn if_refused(plugins: &Registry) -> Result<(), Self> {
        plugins.refused().map_or(Ok(()), |refused| {
            let clause = format!("no plugin is loaded from it: {}", refused.reason);
            Err(Self::image(&refused.path, ErrorCode::PluginUnavailable, clause))
        })
    }

    /// The same error, of this file.
    #[must_use]
    pub fn at_path(mut self, path: &Path) -> Self {
        self.context.path = Some(path.to_owned());
        self
    }

    /// The same error, of a file with this role, unless it has one already.
    #[must_use]
    pub fn in_role(mut self, role: Role) -> Self {
        self.context.role.get_or_insert(role);
        self
    }

    /// The same error, of a file whose role is this one after all, or that has none.
    #[must_use]
    pub fn with_role(mut self, role: Option<Role>) -> Self {
        self.context.role = role;
        self
    }

    /// The same error, of a command that works on the image `given`: what is wrong with another file is wrong with one that
    /// is `below`.
    #[must_use]
    pub fn of_image(self, given: &Path, below: Option<Role>) -> Self {
        match self.path().map(|path| path == given) {
            Some(true) => self.in_role(Role::Image),
            Some(false) => below.into_iter().fold(self, Self::in_role),
            None => self,
        }
    }

    /// The same error, on this device of a guest, at this byte offset of it.
    #[must_use]
    pub fn on_device(mut self, device: Option<u32>, offset: Option<u64>) -> Self {
        (self.context.device, self.context.offset) = (device, offset);
        self
    }

    /// The same error, with the errno of the system call that failed.
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.context.errno = (errno > 0).then_some(errno);
        self
    }

    /// The same error, with the errno of its cause, if that has one.
    #[must_use]
    pub fn caused_by(self, error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        self.with_errno(errno)
    }

    /// The same error, in this step of an operation.
    #[must_use]
    pub fn in_step(mut self, step: &str) -> Self {
        self.context.step = (!step.is_empty()).then(|| step.to_owned());
        self
    }

    /// The same error, whose line also says what the files are like.
    #[must_use]
    pub fn in_state(mut self, state: &str) -> Self {
        self.message = crate::escape::printable(&format!("{}; {state}", self.message)).into_owned();
        self
    }

    /// The file concerned.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.context.path.as_deref()
    }

    /// The role of that file.
    #[must_use]
    pub fn role(&self) -> Option<Role> {
        self.context.role
    }

    /// The device of a guest that the file was.
    #[must_use]
    pub fn device(&self) -> Option<u32> {
        self.context.device
    }

    /// The byte offset in that file.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.context.offset
    }

    /// The errno of the system call that failed.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.context.errno
    }

    /// The step of the operation: of a commit "check", "plan", "write" or "empty".
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

/// What the system says of an error, without the number that Rust appends.
#[must_use]
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
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
        ] {
            let cause = io::Error::from_raw_os_error(errno);
            let error = Error::io(Path::new("a\nb"), ErrorCode::OpenFailed, "cannot be opened", &cause);
            assert_eq!((error.code, error.errno()), (code, Some(errno)));
            assert_eq!(error.message, format!("'a\\nb': cannot be opened: {words}"));
            assert_eq!(error.path(), Some(Path::new("a\nb")));
        }
    }

    #[test]
    fn the_first_role_is_the_right_one() {
        let error = Error::new(ErrorCode::OpenFailed, "x").in_role(Role::Ancestor).in_role(Role::Backing);
        assert_eq!(error.role(), Some(Role::Ancestor));
    }
}
