//! The undo log beside a file that is changed in place: its [format](Header), and [restoring](Log::apply) the file from it.

mod apply;
mod beats;
mod format;
mod source;

pub use apply::{sources, Log, Restored, Unusable};
pub use beats::{now, Rhythm};
pub use format::{nonce, sample, Header, Kind, Record, FIRST, HEADER, MOST_DATA, RECORD, SAMPLES, SOURCE};
pub use source::{born, Source};

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// What is kept is kept by whole blocks of this many bytes, each once.
pub const KEPT_BLOCK: u64 = 4096;
/// What the name of a log ends with.
const SUFFIX: &str = ".instar-undo";

/// The name of the log of a file with this name, in the same directory.
#[must_use]
pub fn log_name(name: &OsStr) -> OsString {
    let mut log = OsString::from(".");
    log.push(name);
    log.push(SUFFIX);
    log
}

/// Whether a file of this name would be taken for the log of another.
#[must_use]
pub fn is_log_name(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b".") && name.ends_with(SUFFIX.as_bytes())
}
