//! Extents on their way to a sink, decoded where only their source can do that.

use crate::error::{DriverError, DriverResult};
use crate::extent::{Content, Extent};
use crate::io::BlockIo;
use crate::traits::{ReadBelow, Sink, Source};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_abi::ErrorCode;

/// Maximum bytes of decoded data that are handed to a sink at once, because it flushes a few times for that …
const MOST: usize = 16 << 20;
/// … or where flushes take no time: the host writes these while the next ones are decoded …
const MOST_OF_NEW: usize = 4 << 20;
/// … and the minimum, however little heap is free.
const LEAST: usize = 64 << 10;

/// Memory for decoded data, which is kept from batch to batch.
#[derive(Debug)]
pub(crate) struct Arena {
    bytes: Vec<u8>,
    most: usize,
}

impl Arena {
    /// Without memory as yet, for a target that was just created, or not.
    pub(crate) const fn new(new_target: bool) -> Self {
        Self { bytes: Vec::new(), most: if new_target { MOST_OF_NEW } else { MOST } }
    }

    /// Have memory for `wanted` bytes, if that is not too much of the heap.
    fn grow(&mut self, io: &dyn BlockIo, wanted: u64) -> &mut [u8] {
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(self.most);
        if self.bytes.len() < wanted {
            // The old one goes first.
            self.bytes = Vec::new();
            let limit = (io.heap_free() / 3).clamp(LEAST, self.most);
            self.bytes = vec![0; wanted.min(limit)];
        }
        &mut self.bytes
    }
}

/// Show a batch to the sink. If that has to know what is encoded, it says so, and is shown the bytes.
pub(crate) fn plan_batch(
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    extents: &[Extent],
    arena: &mut Arena,
) -> DriverResult<()> {
    match sink.plan(io, extents) {
        Err(error) if error.code == ErrorCode::NotImplemented && extents.iter().any(Extent::is_encoded) => {
            decoded(io, source, extents, arena, &mut |io, ready| sink.plan(io, ready))
        }
        planned => planned,
    }
}

/// Write a batch, in one call of the sink if what has to be decoded for it fits into the arena.
pub(crate) fn write_batch(
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    extents: &[Extent],
    below: &mut dyn ReadBelow,
    arena: &mut Arena,
) -> DriverResult<()> {
    if !extents.iter().any(Extent::is_encoded) {
        return sink.write(io, extents, below);
    }
    decoded(io, source, extents, arena, &mut |io, ready| sink.write(io, ready, below))
}

/// What a sink does with extents of which none is encoded.
type EachDecoded<'a> = &'a mut dyn FnMut(&mut dyn BlockIo, &[Extent]) -> DriverResult<()>;

/// Hand extents to `each`, in several calls if need be. Those that only the source can decode are decoded into the arena,
/// which is kept from batch to batch.
fn decoded(
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    extents: &[Extent],
    arena: &mut Arena,
    each: EachDecoded<'_>,
) -> DriverResult<()> {
    let encoded = extents.iter().filter(|extent| extent.is_encoded());
    let arena = arena.grow(io, encoded.map(|extent| extent.length).sum());
    let mut ready: Vec<Extent> = Vec::with_capacity(extents.len());
    let mut used = 0;
    for extent in extents {
        if !extent.is_encoded() {
            ready.push(*extent);
            continue;
        }
        let end = extent.end();
        let mut at = extent.guest_offset;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            // An extent is not cut, because it would be decoded twice, unless it is larger than the arena.
            if used > 0 && left > arena.len() - used {
                each(io, &ready)?;
                ready.clear();
                used = 0;
            }
            let length = left.min(arena.len() - used);
            let bytes = arena.get_mut(used..used + length).unwrap_or_default();
            if bytes.is_empty() {
                return Err(DriverError::new(ErrorCode::InternalOverflow, "there is no room to decode into"));
            }
            source.read(io, extent, at, bytes)?;
            push_decoded(&mut ready, at, bytes);
            at += length as u64;
            used += length;
        }
    }
    each(io, &ready)
}

/// Append decoded bytes of guest byte `at`, or lengthen the extent that they follow in guest and memory.
fn push_decoded(ready: &mut Vec<Extent>, at: u64, bytes: &[u8]) {
    let content = Content::Memory { address: bytes.as_ptr() as u64 };
    let extent = Extent { guest_offset: at, length: bytes.len() as u64, content };
    match ready.last_mut() {
        Some(last) if last.is_followed_by(&extent) => last.length += extent.length,
        _ => ready.push(extent),
    }
}
