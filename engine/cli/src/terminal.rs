//! Standard error, and the width of standard output. Nothing else in the engine writes to standard error: the macros of the
//! standard library panic where nobody reads it, or where it is full, and a commit must not stop in the middle because of a
//! line about it.

use std::io::Write as _;

/// Print text on standard error. It is lost where it cannot be written: no print decides how a command ends.
pub fn say(text: &str) {
    if !text.is_empty() {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

/// Columns of the terminal that standard output is. `None` where it is none.
pub fn width() -> Option<usize> {
    let (terminal_size::Width(columns), _) = terminal_size::terminal_size_of(std::io::stdout())?;
    // Of a terminal that does not know its size, and of one in which no sentence can be read.
    Some(usize::from(columns).max(40))
}
