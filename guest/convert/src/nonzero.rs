//! What a target that reads as zeroes is to get of a disk: everything but zeroes.

use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_guest_view::Filter;

/// Extents that are asked of the disk at once.
const LOOK_AHEAD: usize = 1024;
/// The host is asked about holes in runs of plain data from this length in bytes on: a question takes as long as
/// copying a little less.
const LEAST: u64 = 1 << 20;
/// Questions that are asked at once, at most.
const QUESTIONS: usize = 256;

/// Leaves out what the images of a disk, or their file systems, say is zero.
pub struct NonZero {
    held: Extents,
}

impl Default for NonZero {
    fn default() -> Self {
        Self { held: Extents::with_room_for(LOOK_AHEAD) }
    }
}

impl Filter for NonZero {
    fn extents(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        out: &mut Extents,
    ) -> DriverResult<u64> {
        self.held.clear();
        let next = source.extents(io, range, &mut self.held)?;
        let held: Vec<Extent> = self.held.iter().copied().collect();
        for some in held.chunks(QUESTIONS) {
            if let Some(left) = push_some(io, some, out)? {
                return Ok(left);
            }
        }
        Ok(next)
    }
}

/// Push what of a few extents is no hole. Returns the guest byte from which on there was no room, if there was not.
fn push_some(io: &mut dyn BlockIo, extents: &[Extent], out: &mut Extents) -> DriverResult<Option<u64>> {
    // The first question about each is asked together with the others: in most of them there is no hole.
    let mut questions: Vec<Request> =
        extents.iter().filter_map(|extent| question(extent, extent.guest_offset)).collect();
    if !questions.is_empty() {
        io.run(&mut questions)?;
    }
    let mut answers = questions.iter();
    for extent in extents {
        let left = match extent.content {
            Content::Zero => None,
            Content::Data { .. } if extent.length >= LEAST => {
                let first = answers.next().and_then(|answer| piece(extent, extent.guest_offset, answer));
                push_data(io, extent, first, out)?
            }
            _ => (!out.push(*extent)).then_some(extent.guest_offset),
        };
        if left.is_some() {
            return Ok(left);
        }
    }
    Ok(None)
}

/// The question for the next data of an extent at or after guest byte `at`; none of what is short, or no plain data.
fn question(extent: &Extent, at: u64) -> Option<Request> {
    match extent.clip(at..extent.end())?.content {
        Content::Data { device, offset } if extent.length >= LEAST => {
            Some(Request::next_data(device, offset, extent.end() - at))
        }
        _ => None,
    }
}

/// The part of an extent that an answer calls data; none if the rest of it, from guest byte `at` on, is a hole.
fn piece(extent: &Extent, at: u64, answer: &Request) -> Option<Extent> {
    let Content::Data { offset, .. } = extent.clip(at..extent.end())?.content else { return None };
    let start = at.saturating_add(answer.offset.saturating_sub(offset));
    extent.clip(start..start.saturating_add(answer.length)).filter(|piece| piece.length > 0)
}

/// Push what of plain data is no hole, of which the first piece is known. Returns the guest byte from which on there was no room,
/// if there was not.
fn push_data(
    io: &mut dyn BlockIo,
    extent: &Extent,
    first: Option<Extent>,
    out: &mut Extents,
) -> DriverResult<Option<u64>> {
    let mut next = first;
    while let Some(found) = next {
        if !out.push(found) {
            return Ok(Some(found.guest_offset));
        }
        let at = found.end();
        next = match question(extent, at) {
            Some(asked) => {
                let mut questions = [asked];
                io.run(&mut questions)?;
                piece(extent, at, &questions[0])
            }
            None => None,
        };
    }
    Ok(None)
}
