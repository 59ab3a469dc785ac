//! Printing results.

use crate::error::Error;
use crate::escape::escape_json;
use instar_guest_abi::ErrorCode;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::Value;
use std::io::{self, Write};

/// How a command prints its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// Print text on `out`.
///
/// # Errors
/// When it cannot be written.
pub fn print(out: &mut dyn Write, text: &str) -> Result<(), Error> {
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| Error::new(ErrorCode::OpenFailed, format!("writing the result failed: {error}")))
}

/// Print a JSON value on `out`, indented by four spaces as `qemu-img` does, with a trailing newline.
///
/// # Errors
/// When it cannot be written.
pub fn print_json(out: &mut dyn Write, value: &Value) -> Result<(), Error> {
    print_json_indented(out, value, b"    ")
}

/// Print a JSON value on `out` with this indentation and a trailing newline.
///
/// # Errors
/// When it cannot be written.
pub fn print_json_indented(out: &mut dyn Write, value: &Value, indent: &[u8]) -> Result<(), Error> {
    let text = pretty(value, indent)
        .map_err(|error| Error::new(ErrorCode::InternalOverflow, format!("making JSON failed: {error}")))?;
    print(out, &format!("{text}\n"))
}

fn pretty(value: &Value, indent: &[u8]) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(indent));
    serde::Serialize::serialize(value, &mut serializer)?;
    Ok(escape_json(&String::from_utf8_lossy(&bytes)))
}
