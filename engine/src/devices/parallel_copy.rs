//! Copies of much data: shared where the file system can, otherwise copied by several threads.
//!
//! Long runs go past the page cache of the target: a copy within the kernel fills it with data that nobody will read, one page
//! after the other, and the next flush must write it all back. Whole blocks that are written directly are on the disk already,
//! while the next ones are read. Short runs are better off in the page cache: the disk would be waited for at each of them, and the
//! kernel writes them sorted, and many at once. There the threads save the waiting for what is read.

use super::clone;
use super::copy::{Copier, Job};
use super::direct::Direct;
use super::piece::{pieces, Piece, Segment, PIECE};
use super::workers::Workers;
use super::{retry, Device, Pace, Statistics};
use instar_guest_abi::Request;
use rustix::fs::FallocateFlags;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Total bytes below which copies run in order.
pub const LEAST: u64 = 1 << 20;
/// Runs of fewer bytes than this go through the page cache.
const DIRECT_LEAST: u64 = 256 << 10;
/// Pieces begin and end at multiples of this at least, in bytes: blocks of usual file systems, so that no two of them share one.
const BLOCK: u64 = 4096;
/// Bytes that are shared at once at most: between two such steps the operator can interrupt.
const SHARED_AT_ONCE: u64 = 1 << 30;

/// How the target is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Only past the page cache, by whole blocks of this many bytes.
    Direct(u64),
    /// Long runs past the page cache, by whole blocks of this many bytes; the rest through it.
    Either(u64),
    /// Through the page cache.
    Buffered,
    /// Long runs by the kernel, because the file system may have a server copy them; the rest through the page cache.
    Kernel,
}

/// File systems on a disk or in memory of this machine (statfs(2)): two threads that copy through a buffer are faster there than
/// `copy_file_range`, which moves one page after the other.
const LOCAL: [u64; 2] = [0xEF53, 0x0102_1994];

impl Way {
    fn of(target: &Device) -> Self {
        let block = |direct: Direct| direct.block().max(BLOCK);
        match target.direct {
            Some(direct) => Self::Direct(block(direct)),
            None if target.eager => {
                target.direct_possible().map_or_else(|| Self::cached(target), |direct| Self::Either(block(direct)))
            }
            None => Self::cached(target),
        }
    }

    fn cached(target: &Device) -> Self {
        let local =
            rustix::fs::fstatfs(&target.file).is_ok_and(|system| LOCAL.contains(&system.f_type.cast_unsigned()));
        if local {
            Self::Buffered
        } else {
            Self::Kernel
        }
    }
}

/// What is to be copied, collected while the rest is done.
struct Plan {
    way: Way,
    /// Ascending in the target.
    segments: Vec<Segment>,
}

impl Plan {
    /// The segment of a copy's bytes `from..to` that is left for the threads; empty if there is none. Where files are only read and
    /// written directly, that goes by whole blocks, on both sides.
    fn range(&self, job: &Job<'_>, from: u64, to: u64) -> Range<u64> {
        let request = job.request;
        let block = match self.way {
            Way::Direct(block) => block,
            Way::Either(_) | Way::Buffered => return from..to,
            Way::Kernel => return if to - from < DIRECT_LEAST { from..to } else { to..to },
        };
        let block = job.source.direct.map_or(block, |direct| block.max(direct.block()));
        let start = (request.offset + from).next_multiple_of(block);
        let end = (request.offset + to) / block * block;
        let fits = job.source.direct.is_none() || request.offset % block == request.src_offset % block;
        if start >= end || !fits {
            return to..to;
        }
        start - request.offset..end - request.offset
    }

    /// Leave the bytes `range` of a copy for the threads.
    fn add(&mut self, job: &Job<'_>, range: Range<u64>, copy: usize) {
        job.target.note_data(job.request.offset + range.start, range.end - range.start);
        let mut at = range.start;
        while at < range.end {
            let to = job.request.offset + at;
            let length = (range.end - at).min(PIECE);
            let (source, from) = (Arc::clone(&job.source.file), job.request.src_offset + at);
            self.segments.push(Segment { source, from, to, length, copy });
            at += length;
        }
    }

    /// What is written through the page cache, and what past it.
    fn split(self) -> (Vec<Segment>, Vec<Segment>) {
        let block = match self.way {
            Way::Buffered | Way::Kernel => return (self.segments, Vec::new()),
            Way::Direct(_) => return (Vec::new(), self.segments),
            Way::Either(block) => block,
        };
        let (mut buffered, mut direct) = (Vec::new(), Vec::new());
        for run in self.segments.chunk_by(|a, b| a.to + a.length == b.to) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            if last.to + last.length - first.to < DIRECT_LEAST {
                buffered.extend_from_slice(run);
                continue;
            }
            for segment in run {
                let end = segment.to + segment.length;
                let from = segment.to.next_multiple_of(block).min(end);
                let to = (end / block * block).max(from);
                // The edges do not fill a block.
                buffered.extend([segment.cut(segment.to..from), segment.cut(to..end)].into_iter().flatten());
                direct.extend(segment.cut(from..to));
            }
        }
        (buffered, direct)
    }
}

/// Give the target the blocks that it lacks. Direct writes into blocks that it has go side by side, others one by one. A
/// crash in between leaves zeroes that nothing refers to, or a longer file, as one between the writes would.
fn allocate(target: &Device, segments: &[Segment]) -> io::Result<()> {
    if target.fixed_length {
        return Ok(());
    }
    for run in segments.chunk_by(|a, b| a.to + a.length == b.to) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let length = last.to + last.length - first.to;
        match retry(|| rustix::fs::fallocate(&target.file, FallocateFlags::empty(), first.to, length)) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Copier {
    /// Run these copies from other devices into one, at ascending offsets. `slot` finds a device. Returns the number of
    /// complete copies: all, or those before the one that failed.
    pub fn copy_in_parallel<'a>(
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
        let mut plan = Plan { way: Way::of(target), segments: Vec::new() };
        let mut result = Ok(());
        let mut complete = requests.len();
        for (index, request) in requests.iter().enumerate() {
            let begun = slot(request.src_device).ok_or_else(absent).and_then(|source| {
                let mut job = Job { source, target, request, pace, statistics };
                self.begin(&mut job, index, &mut plan)
            });
            if let Err(error) = begun {
                (complete, result) = (index, Err(error));
                break;
            }
        }
        let (buffered, mut direct) = plan.split();
        let mut run = |pieces: VecDeque<Piece>| {
            workers.copy(pieces, |bytes| {
                statistics.copied_through_host += bytes;
                pace.moved(bytes)?;
                pace.go_on()
            })
        };
        if let Err((copy, error)) = run(pieces(&target.file, buffered)) {
            (complete, result) = (copy.min(complete), Err(error));
            // Those before it are complete only with the rest of them.
            direct.retain(|segment| segment.copy < complete);
        }
        if !direct.is_empty() {
            let ran = allocate(target, &direct).map_err(|error| (0, error)).and_then(|()| {
                let pieces = pieces(&target.file, direct);
                match target.direct {
                    Some(_) => run(pieces),
                    None => {
                        Direct::directly(&target.file, || run(pieces)).map_err(|error| (0, error)).and_then(|ran| ran)
                    }
                }
            });
            if let Err((copy, error)) = ran {
                (complete, result) = (copy.min(complete), Err(error));
            }
        }
        (complete, result)
    }

    /// Do of one copy all but what is left for the plan.
    fn begin(&mut self, job: &mut Job<'_>, index: usize, plan: &mut Plan) -> io::Result<()> {
        let available = job.available();
        let mut done = 0;
        while done < available {
            let (data, end) = job.next_data(done, available);
            job.zero(done, data)?;
            let shared = self.share(job, data, end)?;
            let left = plan.range(job, shared, end);
            self.copy_or_zero(job, shared, left.start)?;
            plan.add(job, left.clone(), index);
            self.copy_or_zero(job, left.end, end)?;
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
            job.target.note_data(job.request.offset + done, length);
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
#[path = "parallel_copy_tests.rs"]
mod tests;
