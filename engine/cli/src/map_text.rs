//! A map as it is printed: in the words of `qemu-img map`, run by run.

use super::color::Paint;
use super::output::{unprinted, OutputFormat};
use instar::error::Error;
use instar::escape::escape_path;
use instar::map::MapRun;
use instar_guest_abi::ErrorCode;
use std::io::{self, Write};

/// Prints runs as they come: for people a table of what is data, for programs everything, one object a line.
pub struct MapText<'w> {
    out: io::BufWriter<&'w mut dyn Write>,
    format: OutputFormat,
    paint: Paint,
    printed: u64,
}

impl<'w> MapText<'w> {
    /// One that prints on `out`.
    pub fn new(out: &'w mut dyn Write, format: OutputFormat, paint: Paint) -> Self {
        Self { out: io::BufWriter::with_capacity(1 << 16, out), format, paint, printed: 0 }
    }

    /// Print the next run.
    ///
    /// # Errors
    /// When it cannot be written; for people, also a run that has no place.
    pub fn print(&mut self, run: &MapRun<'_>) -> Result<(), Error> {
        let text = match (self.format, run.file, run.offset) {
            (OutputFormat::Json, ..) => json(run, self.printed == 0),
            (OutputFormat::Human, ..) if !run.data || run.zero => return Ok(()),
            (OutputFormat::Human, Some(file), Some(offset)) => {
                let heading = if self.printed == 0 { self.heading() } else { String::new() };
                let (start, length, offset) = (hex(run.start), hex(run.length), hex(offset));
                format!("{heading}{start:<16}{length:<16}{offset:<16}{}\n", escape_path(file))
            }
            (OutputFormat::Human, ..) => {
                let clause = format!(
                    "its bytes from {} on are compressed, and have no offset in the file: use --output json",
                    run.start
                );
                return Err(Error::image(run.layer, ErrorCode::UnsupportedFormat, clause));
            }
        };
        self.printed += 1;
        self.out.write_all(text.as_bytes()).map_err(|error| unprinted(&error))
    }

    /// The last run has come.
    ///
    /// # Errors
    /// When the rest cannot be written.
    pub fn end(&mut self) -> Result<(), Error> {
        let written = match (self.format, self.printed) {
            (OutputFormat::Json, 0) => self.out.write_all(b"[]\n"),
            (OutputFormat::Json, _) => self.out.write_all(b"]\n"),
            (OutputFormat::Human, 0) => self.out.write_all(self.heading().as_bytes()),
            (OutputFormat::Human, _) => Ok(()),
        };
        written.and_then(|()| self.out.flush()).map_err(|error| unprinted(&error))
    }

    fn heading(&self) -> String {
        format!("{}\n", self.paint.heading(HEADING))
    }
}

const HEADING: &str = "Offset          Length          Mapped to       File";

/// As C's `%#x` has it.
fn hex(value: u64) -> String {
    if value == 0 {
        "0".into()
    } else {
        format!("{value:#x}")
    }
}

/// In the layout of `qemu-img map`, which scripts take apart line by line.
fn json(run: &MapRun<'_>, first: bool) -> String {
    let MapRun { start, length, depth, present, zero, data, compressed, offset, .. } = run;
    let before = if first { "[" } else { ",\n" };
    let offset = offset.map_or(String::new(), |offset| format!(", \"offset\": {offset}"));
    format!(
        "{before}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}"
    )
}
