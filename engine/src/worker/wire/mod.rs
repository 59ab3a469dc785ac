//! The messages between a caller and its worker: `prost` messages with a length prefix. Paths are bytes, so that every name
//! arrives unchanged. An image may have taken over the worker, so its messages are bounded and believed no further than their
//! content.

mod error;
mod event;
mod frames;
mod outcome;
mod request;

pub use error::{decode_error, encode_error};
pub use event::{answer, note, progress, tell, warning, Answer};
pub use frames::Frames;
pub use request::{parse, request};

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The number of a value: its index in the list of all.
fn number<T: PartialEq>(all: &[T], one: &T) -> u32 {
    all.iter().position(|other| other == one).and_then(|at| u32::try_from(at).ok()).unwrap_or(0)
}

fn by_number<T: Copy>(all: &[T], number: u32) -> Option<T> {
    all.get(usize::try_from(number).ok()?).copied()
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn all_bytes(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| bytes(path)).collect()
}

fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

fn paths(all: &[Vec<u8>]) -> Vec<PathBuf> {
    all.iter().map(|bytes| path(bytes)).collect()
}
