//! What an image holds, as extents.

use crate::image::Image;
use crate::lookup::{Held, Lookup};
use core::ops::Range;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, Extent, Extents};

/// The runs of sectors of a piece that begins at guest byte `start` and is `length` bytes long, as extents.
fn runs<'a>(image: &'a Image, held: &'a Held, start: u64, length: u64) -> impl Iterator<Item = Extent> + 'a {
    let sector = image.layout.sector;
    let sectors = usize::try_from(length / sector).unwrap_or(0);
    let mut at = 0;
    core::iter::from_fn(move || {
        let (data, run) = match held {
            Held::Nothing => return None,
            Held::Zero => (None, Some(at..sectors).filter(|run| !run.is_empty())),
            Held::All(data) => (Some(*data), Some(at..sectors).filter(|run| !run.is_empty())),
            Held::Some(data, bits) => (Some(*data), bits.next_run(at, sectors)),
        };
        let Range { start: from, end } = run?;
        at = end;
        let (offset, length) = (from as u64 * sector, (end - from) as u64 * sector);
        Some(match data {
            Some(data) => Extent::data(start + offset, length, image.device, data + offset),
            None => Extent::zero(start + offset, length),
        })
    })
}

/// See [`Source::extents`](instar_guest_sdk::Source::extents).
pub fn extents(
    io: &mut dyn BlockIo,
    image: &Image,
    lookup: &mut Lookup,
    range: &Range<u64>,
    out: &mut Extents,
) -> DriverResult<u64> {
    let (bytes, size) = (image.layout.piece_bytes(), image.layout.size);
    let limit = range.end.min(size).div_ceil(bytes);
    let mut piece = range.start / bytes;
    while piece < limit {
        let next = lookup.next_piece(io, image, piece, limit)?;
        if next > piece {
            piece = next;
            continue;
        }
        let start = piece.checked_mul(bytes).ok_or_else(|| overflow("a piece"))?;
        let length = bytes.min(size - start);
        let held = lookup.piece(io, image, piece, limit)?;
        for extent in runs(image, held, start, length).filter(|extent| extent.end() > range.start) {
            if !out.push(extent) {
                return Ok(extent.guest_offset);
            }
        }
        piece += 1;
    }
    Ok(limit.saturating_mul(bytes).min(size).max(range.end))
}
