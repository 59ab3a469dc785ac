//! What only the fuzz targets need of the engine's inside. Not a part of its interface.

use crate::check::CheckEvents;
use crate::commit::CommitEvents;
use crate::compare::{CompareEvents, Contents};
use crate::devices::Devices;
use crate::map::{HoleMeaning, MapEvents, MapRun, Place, Runs};
use crate::operation::{Cancel, Events, Handler};
use crate::sandbox::fuzzing::MessageBuffer;
use crate::sandbox::{Host, SandboxError};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::rc::Rc;

pub use crate::sandbox::fuzzing::{load_module, LoadedModule};

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

fn handler<E: Events>(events: E) -> Handler<E> {
    Handler::new(Devices::new(), events, Cancel::new())
}

/// Messages, each with its length in front in two bytes, as each operation takes them. Returns why the guest was ended, and how
/// many bytes of the disk the runs of a map cover that came to its end.
pub fn messages(data: &[u8]) -> (Vec<String>, Option<u64>) {
    let deliver = |handler: &mut dyn Host| -> Result<(), SandboxError> {
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
    let mut results = vec![deliver(&mut handler(CommitEvents::default()))];
    results.push(deliver(&mut handler(CheckEvents::default())));
    let place = |depth| Place { depth, path: format!("layer{depth}").into(), holes: HoleMeaning::Ignored };
    let places = BTreeMap::from([(0, place(0)), (1, place(1))]);
    let mut covered = 0;
    let mut each = |run: &MapRun<'_>| {
        covered += run.length;
        Ok(())
    };
    let mut map = handler(MapEvents::new(MAPPED, u64::MAX, Runs::new(0..u64::MAX, places, Some(Box::new(&mut each)))));
    let result = deliver(&mut map);
    let whole = map.end == Some(Ok(())) && result.is_ok() && map.events.end().is_ok();
    results.push(result);
    drop(map);
    let contents = Contents::at(BTreeMap::from([(0, place(0)), (1, place(1))]), [1, 1]);
    results.push(deliver(&mut handler(CompareEvents::new(contents, [MAPPED; 2], false, Rc::new(())))));
    let ended = results.into_iter().filter_map(Result::err).map(|error| error.to_string());
    (ended.collect(), whole.then_some(covered))
}
