//! Standard error, and how wide the terminals are. Nothing else in the engine writes to standard error: the macros of the
//! standard library panic where nobody reads it, or where it is full, and a commit must not stop in the middle because of a
//! line about it.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::sync::OnceLock;

/// Print text on standard error. It is lost where it cannot be written: no print decides how a command ends.
pub fn say(text: &str) {
    if !text.is_empty() {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

/// Columns of the terminal that standard output was at the start: a confined process can ask it nothing.
static WIDTH: OnceLock<Option<usize>> = OnceLock::new();
/// The same of standard error.
static ERROR_WIDTH: OnceLock<Option<usize>> = OnceLock::new();

/// Remember how wide standard output and standard error are.
pub fn note_width() {
    let _ = WIDTH.set(width_of(std::io::stdout()));
    let _ = ERROR_WIDTH.set(width_of(std::io::stderr()));
}

/// Columns of the terminal that standard output is. `None` where it is none.
pub fn width() -> Option<usize> {
    WIDTH.get().copied().flatten()
}

/// Columns of the terminal that standard error is. `None` where it is none.
pub fn error_width() -> Option<usize> {
    ERROR_WIDTH.get().copied().flatten()
}

/// Columns of the terminal that a stream is. `None` where it is none, or does not know.
pub fn width_of(stream: impl AsFd) -> Option<usize> {
    let (terminal_size::Width(columns), _) = terminal_size::terminal_size_of(stream)?;
    Some(usize::from(columns)).filter(|columns| *columns > 0)
}
