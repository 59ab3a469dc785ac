//! A source of which data that is all zeroes is said to be zeroes.
//!
//! Every byte has to be read for that, once more than to copy it. What was found out is remembered, so that the plan and the
//! writing that follows it see the same, and read nothing twice; past a bound, it is found out again.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{Bitmap, BlockIo, Content, DirtyRanges, DriverResult, Extent, Extents, Source};

/// Extents that are asked of the source at once.
const LOOK_AHEAD: usize = 1024;
/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;
/// Ranges of zeroes that are remembered, at most: 2 MiB of them.
const REMEMBERED: usize = 1 << 17;
/// The smallest piece that is looked at by itself, in bytes, and the largest: blocks of a file system, and clusters of most images.
const UNITS: Range<u64> = 4096..65536;

/// A source, and what is known of its zeroes.
pub struct Detected<'a> {
    source: Box<dyn Source + 'a>,
    /// Bytes that are all zero, or are data: the disk is cut at multiples of them.
    unit: u64,
    held: Extents,
    buffer: Vec<u8>,
    /// Data that is zeroes, ascending.
    zeroes: Vec<Range<u64>>,
    /// Up to this guest byte, all of them are known.
    known: u64,
    /// There is no room for more.
    full: bool,
}

impl<'a> Detected<'a> {
    /// This source, in units of `unit` bytes.
    #[must_use]
    pub fn new(source: Box<dyn Source + 'a>, unit: u64) -> Self {
        let held = Extents::with_room_for(LOOK_AHEAD);
        Self { source, unit: unit.clamp(1, CHUNK), held, buffer: Vec::new(), zeroes: Vec::new(), known: 0, full: false }
    }

    /// The unit for a target that is like this: zeroes that fill none of its clusters save nothing.
    #[must_use]
    pub fn unit_for(target: &ImageInfo) -> u64 {
        target.cluster_size.clamp(UNITS.start, UNITS.end)
    }

    /// Find the zeroes of an extent that is data.
    fn look(&mut self, io: &mut dyn BlockIo, extent: &Extent) -> DriverResult<Vec<Range<u64>>> {
        self.buffer.resize(usize::try_from(CHUNK).unwrap_or(0), 0);
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = extent.guest_offset;
        while at < extent.end() {
            // Whole units, if they fit.
            let end = extent
                .end()
                .min((at.saturating_add(CHUNK) / self.unit * self.unit).max(at.saturating_add(self.unit.min(CHUNK))));
            let bytes = self.buffer.get_mut(..usize::try_from(end - at).unwrap_or(0)).unwrap_or_default();
            crate::read_extent(io, self.source.as_mut(), extent, at, bytes)?;
            let mut from = at;
            while from < end {
                let until = end.min((from / self.unit + 1).saturating_mul(self.unit));
                let place = |byte: u64| usize::try_from(byte - at).unwrap_or(0);
                let unit = bytes.get(place(from)..place(until)).unwrap_or_default();
                if is_zero(unit) {
                    match found.last_mut().filter(|last| last.end == from) {
                        Some(last) => last.end = until,
                        None => found.push(from..until),
                    }
                }
                from = until;
            }
            at = end;
        }
        // What only a driver can decode is not cut: it would be decoded once for each piece.
        if extent.is_encoded() && found.first() != Some(&(extent.guest_offset..extent.end())) {
            found.clear();
        }
        Ok(found)
    }

    /// The zeroes of an extent that is data, ascending.
    fn zeroes_of(&mut self, io: &mut dyn BlockIo, extent: &Extent) -> DriverResult<Vec<Range<u64>>> {
        if extent.end() <= self.known {
            let first = self.zeroes.partition_point(|range| range.end <= extent.guest_offset);
            let known = self.zeroes.get(first..).unwrap_or_default();
            let within = known.iter().take_while(|range| range.start < extent.end());
            return Ok(within.map(|range| range.start.max(extent.guest_offset)..range.end.min(extent.end())).collect());
        }
        let found = self.look(io, extent)?;
        let known = self.known;
        let new = found.iter().filter(|range| range.end > known).map(|range| range.start.max(known)..range.end);
        let before = self.zeroes.len();
        if !self.full {
            self.zeroes.extend(new);
            self.known = extent.end();
        }
        if self.zeroes.len() > REMEMBERED {
            // What is not known as a whole is not known.
            self.zeroes.truncate(before);
            (self.full, self.known) = (true, known);
        }
        Ok(found)
    }
}

/// Whether all bytes are zero: by pieces that the compiler looks at with few instructions.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

impl Source for Detected<'_> {
    fn info(&self) -> ImageInfo {
        self.source.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.source.verify(io, will_empty)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        self.held.clear();
        let next = self.source.extents(io, range, &mut self.held)?;
        let held: Vec<Extent> = self.held.iter().copied().collect();
        for extent in held {
            if extent.content == Content::Zero {
                if !out.push(extent) {
                    return Ok(extent.guest_offset);
                }
                continue;
            }
            let mut at = extent.guest_offset;
            let zeroes = self.zeroes_of(io, &extent)?;
            let end = extent.end();
            for zero in zeroes.into_iter().chain(core::iter::once(end..end)) {
                let data = extent.clip(at..zero.start).filter(|data| data.length > 0);
                if data.is_some_and(|data| !out.push(data)) {
                    return Ok(at);
                }
                at = zero.start;
                if zero.start < zero.end && !out.push(Extent::zero(zero.start, zero.end - zero.start)) {
                    return Ok(at);
                }
                at = zero.end;
            }
        }
        Ok(next)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        self.source.read(io, extent, from, buffer)
    }

    fn identity(&self) -> Option<ImageId> {
        self.source.identity()
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.source.follow_parent(io, identity, stage)
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.source.empty(io)
    }

    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        self.source.bitmaps(io)
    }

    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        self.source.dirty(io, index, from, out)
    }
}
