//! A map as it is printed: in the words of `qemu-img map`, run by run.

use super::Place;
use crate::cli::output::unprinted;
use crate::error::Error;
use crate::escape::escape_path;
use instar_guest_abi::ErrorCode;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

/// How a map is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A table of what is data.
    Human,
    /// Everything, as a JSON array of one object a line.
    Json,
}

/// A run of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest offset in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// The layer; 0 is the top-most.
    pub depth: u32,
    /// That layer holds it.
    pub present: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// It takes space.
    pub data: bool,
    /// It is compressed.
    pub compressed: bool,
    /// The device and the byte offset on it, if it has a place of its own.
    pub place: Option<(u32, u64)>,
}

impl Entry {
    /// Whether `next` is more of the same.
    fn goes_on(&self, next: &Self) -> bool {
        let same = |entry: &Self| (entry.depth, entry.present, entry.zero, entry.data, entry.compressed);
        let places = match (self.place, next.place) {
            (None, None) => true,
            (Some((device, offset)), Some((other, after))) => {
                device == other && offset.checked_add(self.length) == Some(after)
            }
            _ => false,
        };
        same(self) == same(next) && self.start.checked_add(self.length) == Some(next.start) && places
    }

    /// What of it lies in `range`.
    fn within(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.start.max(range.start);
        let end = self.start.saturating_add(self.length).min(range.end);
        let skipped = start - self.start;
        let place = self.place.map(|(device, offset)| (device, offset.saturating_add(skipped)));
        (start < end).then(|| Self { start, length: end - start, place, ..*self })
    }
}

/// Prints entries as they come.
pub struct Reporter<'w> {
    out: io::BufWriter<&'w mut dyn Write>,
    format: Format,
    /// The guest bytes that are reported.
    range: Range<u64>,
    last: Option<Entry>,
    printed: u64,
}

impl<'w> Reporter<'w> {
    /// One that prints on `out` what lies in `range`.
    pub fn new(out: &'w mut dyn Write, format: Format, range: Range<u64>) -> Self {
        Self { out: io::BufWriter::with_capacity(1 << 16, out), format, range, last: None, printed: 0 }
    }

    /// Take the next run. `places` are the files that places are in.
    ///
    /// # Errors
    /// When it cannot be written; for people, also a run that has no place.
    pub fn add(&mut self, entry: Entry, places: &BTreeMap<u32, Place>) -> Result<(), Error> {
        let Some(entry) = entry.within(&self.range) else { return Ok(()) };
        match &mut self.last {
            Some(last) if last.goes_on(&entry) => {
                last.length += entry.length;
                Ok(())
            }
            last => match last.replace(entry) {
                Some(before) => self.print(&before, places),
                None => Ok(()),
            },
        }
    }

    /// The last run has come.
    ///
    /// # Errors
    /// As [`Reporter::add`].
    pub fn end(&mut self, places: &BTreeMap<u32, Place>) -> Result<(), Error> {
        if let Some(last) = self.last.take() {
            self.print(&last, places)?;
        }
        let written = match (self.format, self.printed) {
            (Format::Json, 0) => self.out.write_all(b"[]\n"),
            (Format::Json, _) => self.out.write_all(b"]\n"),
            (Format::Human, 0) => self.out.write_all(HEADING.as_bytes()),
            (Format::Human, _) => Ok(()),
        };
        written.and_then(|()| self.out.flush()).map_err(|error| unprinted(&error))
    }

    fn print(&mut self, entry: &Entry, places: &BTreeMap<u32, Place>) -> Result<(), Error> {
        let text = match self.format {
            Format::Json => json(entry, self.printed == 0),
            Format::Human if !entry.data || entry.zero => return Ok(()),
            Format::Human => {
                let Some((device, offset)) = entry.place else {
                    let clause = format!(
                        "its bytes from {} on are compressed, and have no offset in the file: use --output json",
                        entry.start
                    );
                    let file = places.values().find(|place| place.depth == entry.depth);
                    let path = file.map_or(Path::new(""), |place| &place.path);
                    return Err(Error::image(path, ErrorCode::UnsupportedFormat, clause));
                };
                let path = places.get(&device).map(|place| escape_path(&place.path).to_string()).unwrap_or_default();
                let heading = if self.printed == 0 { HEADING } else { "" };
                format!("{heading}{:<16}{:<16}{:<16}{path}\n", hex(entry.start), hex(entry.length), hex(offset))
            }
        };
        self.printed += 1;
        self.out.write_all(text.as_bytes()).map_err(|error| unprinted(&error))
    }
}

const HEADING: &str = "Offset          Length          Mapped to       File\n";

/// As C's `%#x` has it.
fn hex(value: u64) -> String {
    if value == 0 {
        "0".into()
    } else {
        format!("{value:#x}")
    }
}

fn json(entry: &Entry, first: bool) -> String {
    let Entry { start, length, depth, present, zero, data, compressed, place } = entry;
    let before = if first { "[" } else { ",\n" };
    let offset = place.map_or(String::new(), |(_, offset)| format!(", \"offset\": {offset}"));
    format!(
        "{before}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}"
    )
}
