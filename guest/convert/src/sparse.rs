//! Zeroes that are found in data (`-S`): runs of at least a given number of zero bytes are zeroes, as if a hole were
//! there.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{Bitmap, BlockIo, Content, DirtyRanges, DriverError, DriverResult, Extent, Extents, Source};
use instar_guest_view::{is_zero, read_extent};

/// Bytes that are looked at together.
const SECTOR: usize = 512;
/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;
/// Bytes that are looked at in one call, so that an observer sees progress.
const MOST: u64 = 64 << 20;
/// Extents that are asked of the disk at once.
const LOOK_AHEAD: usize = 1024;

/// A disk, with the zeroes that its data has.
pub struct Sparse<'a> {
    disk: &'a mut dyn Source,
    /// Bytes of the shortest run of zeroes that counts.
    least: u64,
    /// Zeroes are left out, because the target reads as zeroes by itself.
    drops: bool,
    held: Extents,
    buffer: Vec<u8>,
}

/// A run of sectors that are all zero, or all not.
#[derive(Clone, Copy)]
struct Run {
    start: u64,
    end: u64,
    zero: bool,
}

impl<'a> Sparse<'a> {
    /// This disk, where `least` zero bytes, a multiple of 512, are zeroes. With `drops`, they are left out.
    pub fn new(disk: &'a mut dyn Source, least: u64, drops: bool) -> Self {
        let held = Extents::with_room_for(LOOK_AHEAD);
        Self { disk, least: least.max(SECTOR as u64), drops, held, buffer: Vec::new() }
    }

    /// Push the parts of an extent, of which guest bytes `from..to` are looked at. Returns the guest byte from which on there was
    /// no room, if there was not.
    fn push_parts(
        &mut self,
        io: &mut dyn BlockIo,
        extent: &Extent,
        (from, to): (u64, u64),
        out: &mut Extents,
    ) -> DriverResult<Option<u64>> {
        // What was found so far, and not yet pushed: data, with zeroes in it that are too short to count.
        let mut data = Run { start: from, end: from, zero: false };
        let mut zero = Run { start: from, end: from, zero: true };
        let mut at = from;
        while at < to {
            let end = to.min((at / CHUNK + 1).saturating_mul(CHUNK));
            for run in self.runs(io, extent, at..end)? {
                if run.zero {
                    zero = Run { start: if zero.end == run.start { zero.start } else { run.start }, ..run };
                    continue;
                }
                if zero.end == run.start && zero.end - zero.start >= self.least {
                    if let Some(full) = self.push_two(extent, Run { end: zero.start, ..data }, zero, out) {
                        return Ok(Some(full));
                    }
                    data.start = run.start;
                }
                data.end = run.end;
                zero = Run { start: run.end, end: run.end, zero: true };
            }
            at = end;
        }
        if zero.end == to && zero.end - zero.start >= self.least {
            return Ok(self.push_two(extent, Run { end: zero.start, ..data }, zero, out));
        }
        Ok(self.push_two(extent, Run { end: to, ..data }, Run { start: to, end: to, zero: true }, out))
    }

    /// Push data, and the zeroes behind it. Returns where there was no room.
    fn push_two(&self, extent: &Extent, data: Run, zero: Run, out: &mut Extents) -> Option<u64> {
        if let Some(part) = extent.clip(data.start..data.end) {
            if !out.push(part) {
                return Some(data.start);
            }
        }
        let zeroes = Extent::zero(zero.start, zero.end.saturating_sub(zero.start));
        (!self.drops && zeroes.length > 0 && !out.push(zeroes)).then_some(zero.start)
    }

    /// The runs of these guest bytes of an extent.
    fn runs(&mut self, io: &mut dyn BlockIo, extent: &Extent, range: Range<u64>) -> DriverResult<Vec<Run>> {
        let missing = || DriverError::new(ErrorCode::InternalOverflow, "a part of an extent");
        let length = usize::try_from(range.end - range.start).map_err(|_| missing())?;
        if self.buffer.len() < length {
            self.buffer = vec![0; length];
        }
        let bytes = self.buffer.get_mut(..length).ok_or_else(missing)?;
        read_extent(io, self.disk, extent, range.start, bytes)?;
        let mut runs: Vec<Run> = Vec::new();
        let mut at = range.start;
        for sector in bytes.chunks(SECTOR) {
            let end = at + sector.len() as u64;
            let zero = is_zero(sector);
            match runs.last_mut() {
                Some(last) if last.zero == zero => last.end = end,
                _ => runs.push(Run { start: at, end, zero }),
            }
            at = end;
        }
        Ok(runs)
    }
}

impl Source for Sparse<'_> {
    fn info(&self) -> ImageInfo {
        self.disk.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.disk.verify(io, will_empty)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        self.held.clear();
        let next = self.disk.extents(io, range.clone(), &mut self.held)?;
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
            if let Some(full) = self.push_parts(io, &extent, (from, to), out)? {
                return Ok(full);
            }
            if to < end {
                return Ok(to);
            }
            left -= to - from;
        }
        Ok(next)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        self.disk.read(io, extent, from, buffer)
    }

    fn identity(&self) -> Option<ImageId> {
        self.disk.identity()
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.disk.follow_parent(io, identity, stage)
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.disk.empty(io)
    }

    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        self.disk.bitmaps(io)
    }

    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        self.disk.dirty(io, index, from, out)
    }
}
