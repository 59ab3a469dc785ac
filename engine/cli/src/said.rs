//! What people read on standard error: errors, warnings and notes, each a line, which a terminal gets broken between words.

use super::output::{render_error, render_warning, OutputFormat};
use super::paragraph::{filled, Indent};
use super::terminal::{error_width, say};
use instar::error::Error;
use instar::escape::printable;

/// Where the second line of a message begins, so that the next message stands out.
const MESSAGE: Indent = Indent { first: "", rest: "  " };

/// Lines for standard error, as wide as its terminal is; as they are where it is none.
pub fn broken(lines: &str) -> String {
    let width = error_width();
    lines.lines().map(|line| filled(line, MESSAGE, width) + "\n").collect()
}

/// Say an error: to people in lines of the terminal, to programs as one JSON object.
pub fn say_error(error: &Error, output: OutputFormat) {
    let line = render_error(error, output);
    match output {
        OutputFormat::Human => say(&broken(&line)),
        OutputFormat::Json => say(&line),
    }
}

/// Say a warning.
pub fn say_warning(warning: &str) {
    say(&broken(&render_warning(warning)));
}

/// Say a line for `-v`.
pub fn say_note(line: &str) {
    say(&broken(&format!("instar: {}\n", printable(line))));
}
