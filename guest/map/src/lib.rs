//! The map operation: which layer of a chain holds which bytes of the virtual disk, and where. It changes nothing.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use instar_guest_protocol::map::{Outcome, Run, Runs};
use instar_guest_sdk::abi::{ErrorCode, ExtentKind};
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
    let mut last: Option<Run> = None;
    let mut at = 0;
    while at < size {
        let (seen, end) = layers.seen(io, at, size)?;
        if end <= at {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "the layers do not advance"));
        }
        let Place { depth, kind, device, offset } = layers.place(seen, at);
        let next = Run { start: at, length: end - at, depth, kind, device, offset };
        match &mut last {
            Some(last) if goes_on(last, &next) => last.length += next.length,
            _ => last.replace(next).into_iter().for_each(&mut *each),
        }
        at = end;
    }
    last.into_iter().for_each(each);
    Ok(())
}

/// Whether a run is of the same kind as the one before it, and lies behind it.
fn goes_on(last: &Run, next: &Run) -> bool {
    let data = last.kind == ExtentKind::Data as u32;
    last.depth == next.depth
        && last.kind == next.kind
        && last.device == next.device
        && (!data || last.offset.checked_add(last.length) == Some(next.offset))
}
