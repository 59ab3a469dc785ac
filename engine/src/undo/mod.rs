//! The undo log beside a file that is changed in place: its [format](format), and how the file [gets back](apply) what it was.

mod apply;
mod format;

pub use apply::{Log, Restored, Unusable};
pub use format::{Header, Kind, Record, HEADER, MOST_DATA, RECORD};

use std::ffi::{OsStr, OsString};

/// The name of the log of a file with this name, in the same directory.
#[must_use]
pub fn log_name(name: &OsStr) -> OsString {
    let mut log = OsString::from(".");
    log.push(name);
    log.push(".instar-undo");
    log
}
