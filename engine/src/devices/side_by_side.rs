//! Much data: shared where the file system can, otherwise copied by several threads past the page cache of the target.
//!
//! A copy within the kernel fills the page cache of the target with what nobody has asked for, one page after the other, and
//! the next flush waits until all of it is on the disk. Whole blocks that are written directly are there already, while
//! the next ones are read. What does not fill a block, and files that know no direct I/O, go the other way.

use super::clone;
use super::copy::{Copier, Job};
use super::direct::Direct;
use super::workers::{Piece, Workers, PIECE};
use super::{retry, Device, Pace, Statistics};
use instar_guest_abi::Request;
use rustix::fs::FallocateFlags;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Fewer bytes than this are better off in the page cache.
pub const LEAST: u64 = 1 << 20;
/// Pieces begin and end at multiples of this at least, in bytes: blocks of usual file systems, so that no two of them share one.
const BLOCK: u64 = 4096;
/// Bytes that are shared at once at most: between two such steps the operator can interrupt.
const SHARED_AT_ONCE: u64 = 1 << 30;

/// What is to be written directly, collected while the rest is done.
struct Plan {
    /// Pieces begin and end at multiples of this many bytes, in the target.
    block: u64,
    pieces: VecDeque<Piece>,
    /// Where the pieces are in the target: ascending, not adjacent.
    ranges: Vec<Range<u64>>,
}

impl Plan {
    /// How a target is written directly; `None` if it is not.
    fn of(target: &Device) -> Option<Self> {
        let direct = target.direct.or_else(|| Direct::possible(&target.file).filter(|_| target.eager))?;
        let block = direct.block().max(BLOCK);
        Some(Self { block, pieces: VecDeque::new(), ranges: Vec::new() })
    }

    /// The part of a copy's bytes `from..to` that can be written directly, by whole blocks; empty if there is none. Where the
    /// source is read directly, its blocks have to be whole, too.
    fn whole_blocks(&self, job: &Job<'_>, from: u64, to: u64) -> Range<u64> {
        let request = job.request;
        let block = job.source.direct.map_or(self.block, |direct| self.block.max(direct.block()));
        let start = (request.offset + from).next_multiple_of(block);
        let end = (request.offset + to) / block * block;
        let fits = job.source.direct.is_none() || request.offset % block == request.src_offset % block;
        if start >= end || !fits {
            return to..to;
        }
        start - request.offset..end - request.offset
    }

    /// Cut the bytes `range` of a copy into pieces.
    fn add(&mut self, job: &Job<'_>, range: Range<u64>, copy: usize) {
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(PIECE);
            self.pieces.push_back(Piece {
                source: Arc::clone(&job.source.file),
                from: job.request.src_offset + at,
                target: Arc::clone(&job.target.file),
                to: job.request.offset + at,
                length,
                copy,
            });
            at += length;
        }
        let range = job.request.offset + range.start..job.request.offset + range.end;
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }

    /// Give the target the blocks that it lacks. Direct writes into blocks that it has go side by side, others one by one. A
    /// crash in between leaves zeroes that nothing refers to, or a longer file, as one between the writes would.
    fn allocate(&self, target: &Device) -> io::Result<()> {
        if target.fixed_length {
            return Ok(());
        }
        for range in &self.ranges {
            let length = range.end - range.start;
            match retry(|| rustix::fs::fallocate(&target.file, FallocateFlags::empty(), range.start, length)) {
                Ok(()) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Copier {
    /// Do these copies, which go into one device further and further behind and come from others. `slot` finds a device.
    /// Returns how many are complete: all, or those before the one that failed.
    pub fn copy_side_by_side<'a>(
        &mut self,
        slot: impl Fn(u32) -> Option<&'a Device>,
        requests: &[&Request],
        workers: &mut Workers,
        pace: &mut Pace,
        statistics: &mut Statistics,
    ) -> (usize, io::Result<()>) {
        let absent = || io::Error::from_raw_os_error(libc::ENODEV);
        let Some(target) = requests.first().and_then(|request| slot(request.device)) else {
            return (0, Err(absent()));
        };
        let mut plan = Plan::of(target);
        let mut result = Ok(());
        let mut complete = requests.len();
        for (index, request) in requests.iter().enumerate() {
            let begun = slot(request.src_device).ok_or_else(absent).and_then(|source| {
                let mut job = Job { source, target, request, pace, statistics };
                self.begin(&mut job, index, plan.as_mut())
            });
            if let Err(error) = begun {
                (complete, result) = (index, Err(error));
                break;
            }
        }
        if let Some(plan) = plan.filter(|plan| !plan.pieces.is_empty()) {
            let written = plan.allocate(target).map_err(|error| (0, error));
            let run = || {
                workers.copy(plan.pieces, |bytes| {
                    statistics.copied_through_host += bytes;
                    pace.moved(bytes)?;
                    pace.go_on()
                })
            };
            let written = written.and_then(|()| match target.direct {
                Some(_) => run(),
                None => Direct::directly(&target.file, run).map_err(|error| (0, error)).and_then(|ran| ran),
            });
            if let Err((copy, error)) = written {
                // All pieces before the one that failed have arrived.
                (complete, result) = (copy.min(complete), Err(error));
            }
        }
        (complete, result)
    }

    /// Do of one copy all but what is left for the plan.
    fn begin(&mut self, job: &mut Job<'_>, index: usize, mut plan: Option<&mut Plan>) -> io::Result<()> {
        let available = job.available();
        let mut done = 0;
        while done < available {
            let (data, end) = job.next_data(done, available);
            job.zero(done, data)?;
            let shared = self.share(job, data, end)?;
            let direct = plan.as_ref().map_or(end..end, |plan| plan.whole_blocks(job, shared, end));
            self.copy_or_zero(job, shared, direct.start)?;
            if let (Some(plan), false) = (plan.as_mut(), direct.is_empty()) {
                plan.add(job, direct.clone(), index);
            }
            self.copy_or_zero(job, direct.end, end)?;
            done = end;
        }
        job.zero(available, job.request.length)?;
        job.extend()
    }

    /// Share the bytes `from..to` of a copy, if the file system does; returns how far it came.
    fn share(&mut self, job: &mut Job<'_>, from: u64, to: u64) -> io::Result<u64> {
        let key = (job.request.src_device, job.request.device);
        let mut done = from;
        // Only whole blocks can be shared; what is left at the end is copied.
        let end = from + (to - from) / BLOCK * BLOCK;
        while done < end && self.may_share(key) {
            job.pace.go_on()?;
            let length = (end - done).min(SHARED_AT_ONCE);
            let (source, target) = (&job.source.file, &job.target.file);
            match clone::share(source, job.request.src_offset + done, target, job.request.offset + done, length) {
                Ok(()) => {
                    done += length;
                    job.statistics.shared += length;
                    job.pace.moved(length)?;
                }
                Err(error) if clone::is_final(&error) => self.never_share(key),
                Err(error) if clone::is_refusal(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
#[path = "side_by_side_tests.rs"]
mod tests;
