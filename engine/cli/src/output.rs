//! Printing results and errors.

use instar::error::Error;
use instar::escape::{escape_json, printable};
use instar_guest_abi::ErrorCode;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Map, Value};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

/// How a command prints its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputFormat {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

/// Print text on `out`.
///
/// # Errors
/// [`ErrorCode::OutputFailed`].
pub fn print(out: &mut dyn Write, text: &str) -> Result<(), Error> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| unprinted(&error))
}

/// The result of a command could not be printed.
#[must_use]
pub fn unprinted(error: &io::Error) -> Error {
    let message = format!("writing the result to standard output failed: {}", instar::error::reason(error));
    Error::new(ErrorCode::OutputFailed, message).caused_by(error)
}

/// The same for a command that has changed something, which stays changed: say so.
#[must_use]
pub fn unprinted_but(done: &str, path: &Path, error: &Error) -> Error {
    let errno = error.errno().unwrap_or(0);
    Error::image(path, error.code, format!("{done}, but {}", error.message)).with_errno(errno)
}

/// Print a JSON value on `out`, indented by four spaces as `qemu-img` does, with a trailing newline.
///
/// # Errors
/// [`ErrorCode::OutputFailed`].
pub fn print_json(out: &mut dyn Write, value: &(impl Serialize + ?Sized)) -> Result<(), Error> {
    print_json_indented(out, value, b"    ")
}

/// Print a JSON value on `out` with this indentation and a trailing newline.
///
/// # Errors
/// [`ErrorCode::OutputFailed`].
pub fn print_json_indented(out: &mut dyn Write, value: &(impl Serialize + ?Sized), indent: &[u8]) -> Result<(), Error> {
    let text = pretty(value, indent)
        .map_err(|error| Error::new(ErrorCode::InternalOverflow, format!("making JSON failed: {error}")))?;
    print(out, &format!("{text}\n"))
}

fn pretty(value: &(impl Serialize + ?Sized), indent: &[u8]) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(indent));
    value.serialize(&mut serializer)?;
    Ok(escape_json(&String::from_utf8_lossy(&bytes)))
}

/// An error as one line that ends with the name of its code, or as one JSON object.
#[must_use]
pub fn render_error(error: &Error, output: OutputFormat) -> String {
    match output {
        OutputFormat::Human => format!("instar: {} ({})\n", printable(&error.message), error.code.name()),
        OutputFormat::Json => format!("{}\n", escape_json(&error_value(error).to_string())),
    }
}

/// An error as JSON.
#[must_use]
pub fn error_value(error: &Error) -> Value {
    let object: Map<String, Value> = fields(error).map(|(key, value)| (key.to_owned(), value)).collect();
    serde_json::json!({ "error": object })
}

/// The line for a warning.
#[must_use]
pub fn render_warning(warning: &str) -> String {
    format!("instar: warning: {}\n", printable(warning))
}

/// What JSON says of an error: three keys always, the others where they are known.
fn fields(error: &Error) -> impl Iterator<Item = (&'static str, Value)> {
    let always = [
        ("code", error.code.number().into()),
        ("name", error.code.name().into()),
        ("message", error.message.as_str().into()),
    ];
    let known = [
        ("file", error.path().map(|path| absolute(path).to_string_lossy().into_owned().into())),
        ("role", error.role().map(|role| role.name().into())),
        ("errno", error.errno().map(Value::from)),
        ("offset", error.offset().map(Value::from)),
        ("step", error.step().map(Value::from)),
    ];
    always.into_iter().chain(known.into_iter().filter_map(|(key, value)| Some((key, value?))))
}

/// The working directory at the start: later the process may be confined too far to ask for it.
static STARTED_IN: OnceLock<PathBuf> = OnceLock::new();

/// Remember where relative names begin.
pub(super) fn note_directory() {
    let _ = STARTED_IN.set(std::env::current_dir().unwrap_or_default());
}

/// Where relative names begin.
pub(super) fn started_in() -> Option<&'static Path> {
    STARTED_IN.get().map(PathBuf::as_path).filter(|directory| directory.is_absolute())
}

/// A path as an absolute one, without asking the file system: `..` stays, for only the kernel knows where it leads.
#[must_use]
pub fn absolute(path: &Path) -> PathBuf {
    let from = STARTED_IN.get().map_or(Path::new(""), PathBuf::as_path);
    let parts = path.components().filter(|part| *part != Component::CurDir);
    let whole = from.join(parts.collect::<PathBuf>());
    if whole.as_os_str() == OsStr::new("") {
        path.to_owned()
    } else {
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar::error::Role;

    #[test]
    fn an_error_says_what_is_known_of_it() {
        let error = Error::image(Path::new("/no/x"), ErrorCode::NoSpace, "is full\u{202e}");
        assert_eq!(render_error(&error, OutputFormat::Human), "instar: '/no/x': is full\\u{202e} (ERROR_NO_SPACE)\n");
        let all = error.with_errno(28).in_role(Role::Backing).on_device(Some(16), Some(4096)).in_step("write");
        let json: Value = serde_json::from_str(&render_error(&all, OutputFormat::Json)).unwrap_or_default();
        let expected = serde_json::json!({"error": {
            "code": 16, "name": "ERROR_NO_SPACE", "message": "'/no/x': is full\\u{202e}",
            "file": "/no/x", "role": "backing", "errno": 28, "offset": 4096, "step": "write",
        }});
        assert_eq!(json, expected);
    }

    #[test]
    fn names_stay_what_the_kernel_makes_of_them() {
        for (given, shown) in [("/no/./a/../b", "/no/a/../b"), ("/no/a", "/no/a")] {
            assert_eq!(absolute(Path::new(given)), PathBuf::from(shown));
        }
    }
}
