//! Standard error. Nothing else in the engine writes to it: the macros of the standard library panic where nobody reads
//! it, or where it is full, and a commit must not stop in the middle because of a line about it.

use std::io::Write as _;

/// Print text on standard error. It is lost where it cannot be written: no print decides how a command ends.
pub fn say(text: &str) {
    if !text.is_empty() {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}
