//! The map operation: which layer of a chain holds which bytes of the virtual disk, and where. It changes nothing.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_protocol::map::{Outcome, Run, Runs};
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};
use instar_guest_view::{Layers, Place, Reporter};

/// Runs in a message: together less than a message may have.
const RUNS: usize = 256;

/// Map the images that are read, the top-most first: report the runs.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let mut reporter = Reporter::new(send);
    let mut runs = Vec::new();
    let mapped = open(operation).and_then(|mut layers| {
        map(&mut layers, io, &mut |run| {
            runs.push(run);
            if runs.len() == RUNS {
                reporter.event(&Runs { runs: core::mem::take(&mut runs) });
            }
        })
    });
    if !runs.is_empty() {
        reporter.event(&Runs { runs });
    }
    reporter.end(mapped.map(|()| Outcome {}));
}

fn open<'a>(operation: &Operation<'a>) -> DriverResult<Layers<'a>> {
    let layers = Layers::of_group(operation, 0)?;
    if layers.count() == 0 {
        return Err(DriverError::new(ErrorCode::GuestProtocol, "a map is of one image at least"));
    }
    Ok(layers)
}

/// Call `each` with the runs of the whole virtual disk, ascending and without gaps.
///
/// # Errors
/// Those of the sources.
pub fn map(layers: &mut Layers<'_>, io: &mut dyn BlockIo, each: &mut dyn FnMut(Run)) -> DriverResult<()> {
    let size = layers.info().virtual_size;
    let mut last: Option<(Range<u64>, Place)> = None;
    let mut at = 0;
    while at < size {
        let (seen, end) = layers.seen(io, at, size)?;
        if end <= at {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "the layers do not advance"));
        }
        let place = layers.place(seen, at);
        match &mut last {
            Some((run, before)) if before.is_followed_by(run.end - run.start, &place) => run.end = end,
            _ => last.replace((at..end, place)).into_iter().map(message).for_each(&mut *each),
        }
        at = end;
    }
    last.into_iter().map(message).for_each(each);
    Ok(())
}

/// A run as the host is told of it.
fn message((run, place): (Range<u64>, Place)) -> Run {
    let (device, offset) = place.on_device();
    Run { start: run.start, length: run.end - run.start, depth: place.depth, kind: place.kind(), device, offset }
}
