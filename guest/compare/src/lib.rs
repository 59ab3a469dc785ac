//! The compare operation: what two disks, each with the layers below it, have at the same places. Where both are plain, the
//! host compares their bytes, which never enter the guest; what only a driver can decode is compared here. It changes
//! nothing.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_protocol::compare::{Outcome, Pair, Pairs, Side};
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, Content, DriverError, DriverResult, Source};
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

fn open<'a>(operation: &Operation<'a>) -> DriverResult<[Layers<'a>; 2]> {
    let open_group = |group| {
        let layers = Layers::of_group(operation, group)?;
        if layers.count() == 0 {
            return Err(DriverError::new(ErrorCode::GuestProtocol, "a comparison is of two images"));
        }
        Ok(layers)
    };
    Ok([open_group(0)?, open_group(1)?])
}

/// What both disks have in a range.
struct Both {
    range: Range<u64>,
    places: [Place; 2],
    /// How many of its bytes were compared here, and are equal.
    equal: u64,
}

impl Both {
    /// Whether only a driver knows the bytes of one side.
    fn is_encoded(&self) -> bool {
        self.places.iter().any(|place| matches!(place.content, Some(Content::Encoded { .. })))
    }

    /// Whether `next` is a part of the same run on both sides. What was compared here stays on its own.
    fn is_followed_by(&self, next: &Self) -> bool {
        let length = self.range.end - self.range.start;
        let mut sides = self.places.iter().zip(&next.places);
        !self.is_encoded() && !next.is_encoded() && sides.all(|(place, next)| place.is_followed_by(length, next))
    }

    /// The same as the host is told of it.
    fn message(self) -> Pair {
        let side = |place: Place| {
            let (device, offset) = place.on_device();
            Some(Side { depth: place.depth, kind: place.kind(), device, offset })
        };
        let [first, second] = self.places.map(side);
        Pair { start: self.range.start, length: self.range.end - self.range.start, first, second, equal: self.equal }
    }
}

/// Call `each` with what two disks have, ascending, without gaps, to the end of the longer one; or to the first encoded bytes
/// that differ.
///
/// # Errors
/// Those of the sources.
fn compare(views: &mut [Layers<'_>; 2], io: &mut dyn BlockIo, each: &mut dyn FnMut(Pair)) -> DriverResult<()> {
    let size = views.iter().map(|view| view.info().virtual_size).max().unwrap_or(0);
    let mut buffers = [Vec::new(), Vec::new()];
    let mut last: Option<Both> = None;
    let mut at = 0;
    while at < size {
        let [first, second] = views;
        let (one, end) = first.seen_on_disk(io, at, size)?;
        let (two, end) = second.seen_on_disk(io, at, end)?;
        let mut next = Both { range: at..end, places: [first.place(one, at), second.place(two, at)], equal: 0 };
        let mut differs = false;
        if next.is_encoded() {
            next.equal = equal_bytes(views, [one, two], io, at..end, &mut buffers)?;
            differs = next.equal < end - at;
        }
        match &mut last {
            Some(last) if last.is_followed_by(&next) => last.range.end = end,
            _ => last.replace(next).into_iter().map(Both::message).for_each(&mut *each),
        }
        if differs {
            break;
        }
        at = end;
    }
    last.into_iter().map(Both::message).for_each(each);
    Ok(())
}

/// How many bytes are equal of what is seen in a range that begins with these.
fn equal_bytes(
    views: &mut [Layers<'_>; 2],
    seen: [Seen; 2],
    io: &mut dyn BlockIo,
    range: Range<u64>,
    buffers: &mut [Vec<u8>; 2],
) -> DriverResult<u64> {
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(CHUNK.min(range.end - at)).unwrap_or(0);
        for ((view, seen), buffer) in views.iter_mut().zip(seen).zip(&mut *buffers) {
            buffer.resize(length, 0);
            view.read_seen(io, seen, at, buffer)?;
        }
        let [one, two] = buffers;
        if let Some(differs) = one.iter().zip(two.iter()).position(|(one, two)| one != two) {
            return Ok(at - range.start + differs as u64);
        }
        at += length as u64;
    }
    Ok(range.end - range.start)
}
