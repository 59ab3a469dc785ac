//! What only the fuzz targets need of the engine's inside. Not a part of its interface.

use crate::check::handler::CheckHandler;
use crate::commit::handler::CommitHandler;
use crate::devices::Devices;
use crate::map::handler::MapHandler;
use crate::map::{Format, Holes, Place, Reporter};
use crate::vm::fuzzing::MessageBuffer;
use crate::vm::{GuestHandler, VmError};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;

pub use crate::vm::fuzzing::{load_module, LoadedModule};

/// See `plugins::elf`: whether these bytes would be handed to the dynamic loader.
///
/// # Errors
/// Why not.
pub fn check_library(data: &[u8]) -> Result<(), String> {
    crate::plugins::fuzzing::check(data)
}

/// A file that has no name.
///
/// # Errors
/// The kernel's.
pub fn anonymous_file() -> io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC)?))
}

/// Bytes of the disk that [`messages`] maps.
pub const MAPPED: u64 = 1 << 20;

/// Messages, each with its length in front in two bytes, as each operation takes them. Returns why the guest was ended, and the
/// JSON of a map that came to its end.
pub fn messages(data: &[u8]) -> (Vec<String>, Option<Vec<u8>>) {
    let deliver = |handler: &mut dyn GuestHandler| -> Result<(), VmError> {
        let mut buffer = MessageBuffer::new()?;
        let mut rest = data;
        while let [high, low, after @ ..] = rest {
            let length = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
            let (message, next) = after.split_at(length);
            buffer.take(message, handler)?;
            rest = next;
        }
        Ok(())
    };
    let mut results = vec![deliver(&mut CommitHandler::new(Devices::new()))];
    results.push(deliver(&mut CheckHandler::new(Devices::new())));
    let place = |depth| Place { depth, path: format!("layer{depth}").into(), holes: Holes::Ignored };
    let places = BTreeMap::from([(0, place(0)), (1, place(1))]);
    let mut out = Vec::new();
    let mut reporter = Reporter::new(&mut out, Format::Json, 0..u64::MAX);
    let mut handler = MapHandler::new(Devices::new(), places, MAPPED, &mut reporter);
    let result = deliver(&mut handler);
    let whole = matches!(handler.result, Some(Ok(()))) && result.is_ok() && handler.end().is_ok();
    results.push(result);
    drop(reporter);
    let ended = results.into_iter().filter_map(Result::err).map(|error| error.to_string());
    (ended.collect(), whole.then_some(out))
}
