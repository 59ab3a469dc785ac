//! Copying between files: within the kernel where it can, through a buffer where it cannot. Holes stay holes.

use super::pace::Pace;
use super::statistics::Statistics;
use super::{retry, salvage, Device};
use instar_guest_abi::Request;
use std::collections::HashSet;
use std::io;

/// Bytes of the buffer that data passes through where the kernel does not copy.
const BUFFER: usize = 1 << 20;
/// Bytes that one `copy_file_range` is asked for at most: between two of them the operator can interrupt, and the disk begins
/// to write the first.
const CHUNK: u64 = 32 << 20;
/// Holes of at least this many bytes stay holes in any target; shorter ones only where it has nothing else.
const SPARSE_MINIMUM: u64 = 64 << 10;

/// Copies data, and remembers the pairs of devices between which the kernel cannot.
#[derive(Debug, Default)]
pub struct Copier {
    not_in_kernel: HashSet<(u32, u32)>,
    not_shared: HashSet<(u32, u32)>,
    buffer: Vec<u8>,
}

/// Errors of `copy_file_range` that mean "not between these two files" (copy_file_range(2)).
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EXDEV | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS | libc::EBADF | libc::ETXTBSY | libc::EPERM)
    )
}

/// One copy. Positions are relative to its beginning.
pub struct Job<'a> {
    /// The source.
    pub source: &'a Device,
    /// The target.
    pub target: &'a Device,
    /// The bytes to copy.
    pub request: &'a Request,
    /// The pace of the copy.
    pub pace: &'a mut Pace,
    /// The counters.
    pub statistics: &'a mut Statistics,
}

impl Copier {
    /// Stop trying the kernel between these devices.
    #[cfg(test)]
    pub fn refuse_kernel(&mut self, source: u32, target: u32) {
        self.not_in_kernel.insert((source, target));
    }

    /// Copy the bytes of a request from one device to the other. Bytes past the end of the source read as zero. `pace` slows
    /// the copy down, and may fail it with EINTR.
    pub fn copy(
        &mut self,
        (source, target): (&Device, &Device),
        request: &Request,
        pace: &mut Pace,
        statistics: &mut Statistics,
    ) -> io::Result<()> {
        let mut job = Job { source, target, request, pace, statistics };
        let available = job.available();
        let mut done = 0;
        while done < available {
            let (data, end) = job.next_data(done, available);
            job.zero(done, data)?;
            self.copy_or_zero(&mut job, data, end)?;
            done = end;
        }
        job.zero(available, request.length)?;
        job.extend()
    }

    /// Whether extents may be shared between these devices.
    pub fn may_share(&self, devices: (u32, u32)) -> bool {
        !self.not_shared.contains(&devices)
    }

    /// They are not, not even of other ranges.
    pub fn never_share(&mut self, devices: (u32, u32)) {
        self.not_shared.insert(devices);
    }

    /// Copy the bytes `from..to`. If the source has become shorter, zero the missing ones.
    pub fn copy_or_zero(&mut self, job: &mut Job<'_>, from: u64, to: u64) -> io::Result<()> {
        let done = self.copy_data(job, from, to)?;
        if done < to {
            job.zero(done, to)?;
        }
        Ok(())
    }

    /// Copy data; returns how far it came: to `end`, unless the source ended before.
    fn copy_data(&mut self, job: &mut Job<'_>, mut done: u64, end: u64) -> io::Result<u64> {
        let key = (job.request.src_device, job.request.device);
        // What fails is to be told sector by sector.
        let salvages = job.source.salvage.is_some();
        while done < end && !salvages && !self.not_in_kernel.contains(&key) {
            job.pace.go_on()?;
            let (mut from, mut to) = (job.request.src_offset + done, job.request.offset + done);
            let length = usize::try_from((end - done).min(job.pace.piece(CHUNK))).unwrap_or(BUFFER);
            job.target.note_data(to, length as u64);
            let (source, target) = (&job.source.file, &job.target.file);
            match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), length) {
                // The source ended, or the file system only says so (some do): reading will tell.
                Ok(0) => break,
                Ok(copied) => {
                    done += copied as u64;
                    job.statistics.copied_in_kernel += copied as u64;
                    job.target.begin_writeback(to - copied as u64, copied as u64);
                    job.pace.moved(copied as u64)?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    let error = io::Error::from(error);
                    if !is_refusal(&error) {
                        return Err(error);
                    }
                    self.not_in_kernel.insert(key);
                }
            }
        }
        if done < end {
            self.buffer.resize(BUFFER, 0);
        }
        while done < end {
            job.pace.go_on()?;
            let want = usize::try_from((end - done).min(job.pace.piece(BUFFER as u64))).unwrap_or(BUFFER);
            let bytes = &mut self.buffer[..want];
            match job.source.read_at(job.request.src_offset + done, bytes) {
                Ok(0) => break,
                Ok(length) => {
                    job.target.write_all_at(job.request.offset + done, &bytes[..length])?;
                    done += length as u64;
                    job.statistics.copied_through_host += length as u64;
                    job.pace.moved(length as u64)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    salvage::read(job.source, job.request.src_offset + done, bytes, error)?;
                    job.target.write_all_at(job.request.offset + done, bytes)?;
                    done += want as u64;
                    job.pace.moved(want as u64)?;
                }
            }
        }
        Ok(done)
    }
}

impl Job<'_> {
    /// Return the number of its bytes that the source has.
    pub fn available(&self) -> u64 {
        self.source.length.saturating_sub(self.request.src_offset).min(self.request.length)
    }

    /// Find the next data at or after `done`, up to `end`, and return its bounds. The range before it is a hole to keep: a
    /// large one, or one that the target has as well. A short hole over data counts as data, because writing zeroes costs less
    /// than punching a hole, and keeps the target in one piece.
    pub fn next_data(&self, done: u64, end: u64) -> (u64, u64) {
        if end - done < SPARSE_MINIMUM && !self.target.reads_as_zero(self.request.offset + done, end - done) {
            return (done, end);
        }
        let base = self.request.src_offset;
        let next = |from: u64| {
            let (data, hole) = self.source.next_data(base + from, base + end);
            (data - base, hole - base)
        };
        let kept = |from: u64, to: u64| {
            to - from >= SPARSE_MINIMUM || self.target.reads_as_zero(self.request.offset + from, to - from)
        };
        let (mut data, mut hole) = next(done);
        if data > done && !kept(done, data) {
            data = done;
        }
        while hole < end {
            let (from, to) = next(hole);
            if kept(hole, from) {
                break;
            }
            hole = to;
        }
        (data, hole)
    }

    /// Make the bytes `from..to` of the copy read as zero. Past the old end of the target they already do, even if this copy
    /// has written bytes after them.
    pub fn zero(&mut self, from: u64, to: u64) -> io::Result<()> {
        self.pace.passed(to.saturating_sub(from));
        let start = self.request.offset + from;
        let end = (self.request.offset + to).min(self.target.length);
        if from >= to || start >= end {
            return Ok(());
        }
        self.target.zero(start, end - start, false)?;
        self.statistics.zeroed += end - start;
        Ok(())
    }

    /// Give the target the length that it would have with every byte written.
    pub fn extend(&self) -> io::Result<()> {
        let end = self.request.offset + self.request.length;
        if self.target.fixed_length || self.request.length == 0 || end <= self.target.length {
            return Ok(());
        }
        if self.target.file.metadata()?.len() < end {
            retry(|| rustix::fs::ftruncate(&self.target.file, end))?;
        }
        Ok(())
    }
}
