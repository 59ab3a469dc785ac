//! A filter for which data that is all zeroes is said to be zeroes.
//!
//! Every byte has to be read for that, once more than to copy it. What was found out is remembered, so that the plan and the
//! writing that follows it see the same, and read nothing twice; past a bound, it is found out again.

use crate::filtered::Filter;
use crate::zero_runs::ZeroRuns;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ImageInfo;
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};

/// Extents that are asked of the source at once.
const LOOK_AHEAD: usize = 1024;
/// Ranges of zeroes that are remembered, at most: 2 MiB of them.
const REMEMBERED: usize = 1 << 17;
/// The smallest piece that is looked at by itself, in bytes, and the largest: blocks of a file system, and clusters of most images.
const UNITS: Range<u64> = 4096..65536;

/// What is known of the zeroes of a source.
pub struct Detected {
    /// Units of bytes that are all zero, or are data.
    runs: ZeroRuns,
    held: Extents,
    /// Data that is zeroes, ascending.
    zeroes: Vec<Range<u64>>,
    /// Up to this guest byte, all of them are known.
    known: u64,
    /// There is no room for more.
    full: bool,
}

impl Detected {
    /// Nothing yet; zeroes are found in units of `unit` bytes.
    #[must_use]
    pub fn new(unit: u64) -> Self {
        let held = Extents::with_room_for(LOOK_AHEAD);
        Self { runs: ZeroRuns::of(unit), held, zeroes: Vec::new(), known: 0, full: false }
    }

    /// The unit for a target that is like this: zeroes that fill none of its clusters save nothing.
    #[must_use]
    pub fn unit_for(target: &ImageInfo) -> u64 {
        target.cluster_size.clamp(UNITS.start, UNITS.end)
    }

    /// Find the zeroes of an extent that is data.
    fn look(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        extent: &Extent,
    ) -> DriverResult<Vec<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = extent.guest_offset;
        while at < extent.end() {
            let end = extent.end().min(self.runs.next(at));
            for run in self.runs.within(io, source, extent, at..end)?.into_iter().filter(|run| run.zero) {
                match found.last_mut().filter(|last| last.end == run.start) {
                    Some(last) => last.end = run.end,
                    None => found.push(run.start..run.end),
                }
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
    fn zeroes_of(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        extent: &Extent,
    ) -> DriverResult<Vec<Range<u64>>> {
        if extent.end() <= self.known {
            let first = self.zeroes.partition_point(|range| range.end <= extent.guest_offset);
            let known = self.zeroes.get(first..).unwrap_or_default();
            let within = known.iter().take_while(|range| range.start < extent.end());
            return Ok(within.map(|range| range.start.max(extent.guest_offset)..range.end.min(extent.end())).collect());
        }
        let found = self.look(source, io, extent)?;
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

impl Filter for Detected {
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
        for extent in held {
            if extent.content == Content::Zero {
                if !out.push(extent) {
                    return Ok(extent.guest_offset);
                }
                continue;
            }
            let mut at = extent.guest_offset;
            let zeroes = self.zeroes_of(source, io, &extent)?;
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
}
