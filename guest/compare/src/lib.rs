//! The compare operation: what two disks, each with the layers below it, have at the same places. Where both are plain, the
//! host compares their bytes, which never enter the guest; what only a driver can decode is compared here. It changes
//! nothing.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use instar_guest_protocol::compare::{Outcome, Pair, Pairs, Side};
use instar_guest_sdk::abi::{ErrorCode, ExtentKind};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};
use instar_guest_view::{Layers, Place, Reporter, Seen};

/// Pairs in a message: together less than a message may have.
const PAIRS: usize = 128;
/// Bytes that are decoded at once.
const CHUNK: u64 = 64 << 10;

/// Compare the views of the two groups: report what they have, and where what is encoded differs.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let mut reporter = Reporter::new(send);
    let mut pairs = Vec::new();
    let compared = open(operation).and_then(|mut views| {
        compare(&mut views, io, &mut |pair| {
            pairs.push(pair);
            if pairs.len() == PAIRS {
                reporter.event(&Pairs { pairs: core::mem::take(&mut pairs) });
            }
        })
    });
    if !pairs.is_empty() {
        reporter.event(&Pairs { pairs });
    }
    reporter.end(compared.map(|()| Outcome {}));
}

fn open<'a>(operation: &Operation<'a>) -> DriverResult<[View<'a>; 2]> {
    let open_group = |group| {
        let layers = Layers::of_group(operation, group)?;
        if layers.count() == 0 {
            return Err(DriverError::new(ErrorCode::GuestProtocol, "a comparison is of two images"));
        }
        Ok(View { size: layers.info().virtual_size, layers })
    };
    Ok([open_group(0)?, open_group(1)?])
}

/// A disk.
struct View<'a> {
    layers: Layers<'a>,
    /// Virtual size in bytes.
    size: u64,
}

impl View<'_> {
    /// What is at `at`, and up to which byte (`limit` at most) that goes. Past its end a disk has nothing.
    fn seen(&mut self, io: &mut dyn BlockIo, at: u64, limit: u64) -> DriverResult<(Seen, u64)> {
        if at >= self.size {
            return Ok((Seen::Nothing, limit));
        }
        let (seen, end) = self.layers.seen(io, at, limit.min(self.size))?;
        if end <= at {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "the layers do not advance"));
        }
        Ok((seen, end))
    }

    /// The same as a message says it.
    fn side(&self, seen: Seen, at: u64) -> Side {
        let Place { depth, kind, device, offset } = self.layers.place(seen, at);
        Side { depth, kind, device, offset }
    }
}

fn is_encoded(side: &Side) -> bool {
    side.kind == ExtentKind::Encoded as u32
}

/// Call `each` with what two disks have, ascending, without gaps, to the end of the longer one; or to the first encoded bytes
/// that differ.
///
/// # Errors
/// Those of the sources.
fn compare(views: &mut [View<'_>; 2], io: &mut dyn BlockIo, each: &mut dyn FnMut(Pair)) -> DriverResult<()> {
    let size = views[0].size.max(views[1].size);
    let mut buffers = [Vec::new(), Vec::new()];
    let mut last: Option<Pair> = None;
    let mut at = 0;
    while at < size {
        let [first, second] = views;
        let (one, end) = first.seen(io, at, size)?;
        let (two, end) = second.seen(io, at, end)?;
        let sides = (first.side(one, at), second.side(two, at));
        let mut next = Pair { start: at, length: end - at, first: Some(sides.0), second: Some(sides.1), equal: 0 };
        let encoded = is_encoded(&sides.0) || is_encoded(&sides.1);
        if encoded {
            next.equal = equal_bytes(views, [one, two], io, at..end, &mut buffers)?;
        }
        match &mut last {
            Some(last) if !encoded && goes_on(last, &next) => last.length += next.length,
            _ => last.replace(next).into_iter().for_each(&mut *each),
        }
        if encoded && next.equal < next.length {
            break;
        }
        at = end;
    }
    last.into_iter().for_each(each);
    Ok(())
}

/// How many bytes are equal of what is seen in a range that begins with these.
fn equal_bytes(
    views: &mut [View<'_>; 2],
    seen: [Seen; 2],
    io: &mut dyn BlockIo,
    range: core::ops::Range<u64>,
    buffers: &mut [Vec<u8>; 2],
) -> DriverResult<u64> {
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(CHUNK.min(range.end - at)).unwrap_or(0);
        for ((view, seen), buffer) in views.iter_mut().zip(seen).zip(&mut *buffers) {
            buffer.resize(length, 0);
            view.layers.read_seen(io, seen, at, buffer)?;
        }
        let [one, two] = buffers;
        if let Some(differs) = one.iter().zip(two.iter()).position(|(one, two)| one != two) {
            return Ok(at - range.start + differs as u64);
        }
        at += length as u64;
    }
    Ok(range.end - range.start)
}

/// Whether a pair is of the same kinds as the one before it, and lies behind it.
fn goes_on(last: &Pair, next: &Pair) -> bool {
    let side_goes_on = |before: Option<Side>, after: Option<Side>| {
        let (Some(before), Some(after)) = (before, after) else { return false };
        let data = before.kind == ExtentKind::Data as u32;
        !is_encoded(&before)
            && (before.depth, before.kind, before.device) == (after.depth, after.kind, after.device)
            && (!data || before.offset.checked_add(last.length) == Some(after.offset))
    };
    side_goes_on(last.first, next.first) && side_goes_on(last.second, next.second)
}
