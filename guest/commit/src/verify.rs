//! Reading back what was written: the target is opened again, as its next user will open it, and each range that the
//! layers hold is paired with the same range of the target. Where both are plain, the host compares their bytes, which
//! never enter the guest; what only a driver can decode is compared here.

use crate::target::Target;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_protocol::commit::event::Kind;
use instar_guest_protocol::commit::{Pair, Side, Verify};
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{check_extents, BlockIo, Content, DriverError, DriverResult, Extent, Extents, Source};
use instar_guest_view::{read_extent, Layers};

/// Extents of the layers that are asked for at once.
const EXTENTS: usize = 1 << 12;
/// Pairs in a message: together less than a message may have.
const PAIRS: usize = 128;
/// Bytes that are decoded at once.
const CHUNK: u64 = 64 << 10;
/// What is compared, and what was found and not told yet.
struct Comparison<'a, 't, 'r, 's> {
    target: &'t Target<'a, 'r, 's>,
    /// The target as a source, and what is below it.
    seen: Layers<'a>,
    pairs: Vec<Pair>,
    buffers: [Vec<u8>; 2],
}

/// Compare what the layers hold with what is seen on the target, whose disk has `virtual_size` bytes. `done` is told up to which
/// guest byte.
///
/// # Errors
/// What the images cannot be read for.
pub fn verify(
    target: &Target<'_, '_, '_>,
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    virtual_size: u64,
    done: &mut dyn FnMut(u64),
) -> DriverResult<()> {
    target.tell(Kind::Verify(Verify { pairs: Vec::new() }));
    let seen = Layers::new(target.open_below(io, &[], virtual_size)?);
    let mut comparison = Comparison { target, seen, pairs: Vec::new(), buffers: Default::default() };
    let end = source.info().virtual_size;
    let mut from = 0;
    let mut extents = Extents::with_room_for(EXTENTS);
    while from < end {
        extents.clear();
        let next = source.extents(io, from..end, &mut extents)?;
        check_extents(&extents, from, next, end).map_err(|why| DriverError::new(ErrorCode::GuestProtocol, why))?;
        for extent in extents.iter() {
            comparison.add(io, source, extent)?;
        }
        from = next;
        done(next);
    }
    comparison.tell();
    Ok(())
}

impl Comparison<'_, '_, '_, '_> {
    /// Pair an extent of the layers with what is seen there.
    fn add(&mut self, io: &mut dyn BlockIo, source: &mut dyn Source, extent: &Extent) -> DriverResult<()> {
        let mut at = extent.guest_offset;
        while at < extent.end() {
            let (found, end) = self.seen.seen_on_disk(io, at, extent.end())?;
            let Some(held) = extent.clip(at..end) else { return Err(stuck()) };
            let place = self.seen.place(found, at);
            let target = place.on_device();
            let encoded = extent.is_encoded() || matches!(place.content, Some(Content::Encoded { .. }));
            let equal = if encoded {
                let [one, two] = &mut self.buffers;
                let mut layers =
                    |io: &mut dyn BlockIo, at, buffer: &mut [u8]| read_extent(io, source, extent, at, buffer);
                let seen = &mut self.seen;
                let mut target = |io: &mut dyn BlockIo, at, buffer: &mut [u8]| seen.read_seen(io, found, at, buffer);
                equal_bytes(io, at..end, (&mut layers, one), (&mut target, two))?
            } else {
                0
            };
            let (device, offset) = match held.content {
                Content::Data { device, offset } => (device, offset),
                _ => (0, 0),
            };
            self.pairs.push(Pair {
                start: at,
                length: end - at,
                layers: Some(Side { kind: held.content.kind() as u32, device, offset }),
                target: Some(Side { kind: place.kind(), device: target.0, offset: target.1 }),
                equal,
            });
            // The host ends a guest whose images differ: nothing behind that needs to be read.
            if self.pairs.len() == PAIRS || (encoded && equal < end - at) {
                self.tell();
            }
            at = end;
        }
        Ok(())
    }

    fn tell(&mut self) {
        if !self.pairs.is_empty() {
            self.target.tell(Kind::Verify(Verify { pairs: core::mem::take(&mut self.pairs) }));
        }
    }
}

fn stuck() -> DriverError {
    DriverError::new(ErrorCode::InternalOverflow, "what is read back does not advance")
}

/// Reads the bytes of a disk from a guest byte on.
type Read<'r> = &'r mut dyn FnMut(&mut dyn BlockIo, u64, &mut [u8]) -> DriverResult<()>;

/// How many bytes of a range are equal that both sides begin with.
fn equal_bytes(
    io: &mut dyn BlockIo,
    range: Range<u64>,
    (first, one): (Read<'_>, &mut Vec<u8>),
    (second, two): (Read<'_>, &mut Vec<u8>),
) -> DriverResult<u64> {
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(CHUNK.min(range.end - at)).unwrap_or(0);
        one.resize(length, 0);
        two.resize(length, 0);
        first(io, at, one)?;
        second(io, at, two)?;
        if let Some(differs) = one.iter().zip(two.iter()).position(|(one, two)| one != two) {
            return Ok(at - range.start + differs as u64);
        }
        at += length as u64;
    }
    Ok(range.end - range.start)
}
