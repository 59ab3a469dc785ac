//! Zeroes that are found in data (`-S`): runs of at least a given number of zero bytes are zeroes, as if a hole were
//! there.

use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_guest_view::{Filter, ZeroRun, ZeroRuns};

/// Bytes that are looked at together.
const SECTOR: u64 = 512;
/// Bytes that are looked at in one call, so that an observer sees progress.
const MOST: u64 = 64 << 20;
/// Extents that are asked of the disk at once.
const LOOK_AHEAD: usize = 1024;

/// The zeroes that the data of a disk has.
pub struct Sparse {
    /// Bytes of the shortest run of zeroes that counts.
    least: u64,
    /// Zeroes are left out, because the target reads as zeroes by itself.
    drops: bool,
    held: Extents,
    runs: ZeroRuns,
}

impl Sparse {
    /// `least` zero bytes, a multiple of 512, are zeroes. With `drops`, they are left out.
    pub fn new(least: u64, drops: bool) -> Self {
        let held = Extents::with_room_for(LOOK_AHEAD);
        Self { least: least.max(SECTOR), drops, held, runs: ZeroRuns::of(SECTOR) }
    }

    /// Push the parts of an extent, of which guest bytes `from..to` are looked at. Returns the guest byte from which on there was
    /// no room, if there was not.
    fn push_parts(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        extent: &Extent,
        (from, to): (u64, u64),
        out: &mut Extents,
    ) -> DriverResult<Option<u64>> {
        // What was found so far, and not yet pushed: data, with zeroes in it that are too short to count.
        let mut data = ZeroRun { start: from, end: from, zero: false };
        let mut zero = ZeroRun { start: from, end: from, zero: true };
        let mut at = from;
        while at < to {
            let end = to.min((at / ZeroRuns::CHUNK + 1).saturating_mul(ZeroRuns::CHUNK));
            for run in self.runs.within(io, source, extent, at..end)? {
                if run.zero {
                    zero = ZeroRun { start: if zero.end == run.start { zero.start } else { run.start }, ..run };
                    continue;
                }
                if zero.end == run.start && zero.end - zero.start >= self.least {
                    if let Some(full) = self.push_two(extent, ZeroRun { end: zero.start, ..data }, zero, out) {
                        return Ok(Some(full));
                    }
                    data.start = run.start;
                }
                data.end = run.end;
                zero = ZeroRun { start: run.end, end: run.end, zero: true };
            }
            at = end;
        }
        if zero.end == to && zero.end - zero.start >= self.least {
            return Ok(self.push_two(extent, ZeroRun { end: zero.start, ..data }, zero, out));
        }
        Ok(self.push_two(extent, ZeroRun { end: to, ..data }, ZeroRun { start: to, end: to, zero: true }, out))
    }

    /// Push data, and the zeroes behind it. Returns where there was no room.
    fn push_two(&self, extent: &Extent, data: ZeroRun, zero: ZeroRun, out: &mut Extents) -> Option<u64> {
        if let Some(part) = extent.clip(data.start..data.end) {
            if !out.push(part) {
                return Some(data.start);
            }
        }
        let zeroes = Extent::zero(zero.start, zero.end.saturating_sub(zero.start));
        (!self.drops && zeroes.length > 0 && !out.push(zeroes)).then_some(zero.start)
    }
}

impl Filter for Sparse {
    fn extents(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        out: &mut Extents,
    ) -> DriverResult<u64> {
        self.held.clear();
        let next = source.extents(io, range.clone(), &mut self.held)?;
        let held: Vec<Extent> = self.held.iter().copied().collect();
        let mut left = MOST;
        for extent in held {
            let (from, end) = (extent.guest_offset.max(range.start), extent.end());
            if matches!(extent.content, Content::Zero) {
                if !self.drops && !out.push(extent) {
                    return Ok(extent.guest_offset);
                }
                continue;
            }
            let to = end.min(from.saturating_add(left));
            if let Some(full) = self.push_parts(source, io, &extent, (from, to), out)? {
                return Ok(full);
            }
            if to < end {
                return Ok(to);
            }
            left -= to - from;
        }
        Ok(next)
    }
}
