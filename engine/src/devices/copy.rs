//! Copying between files without the guest.
//!
//! The kernel copies where it can (`copy_file_range`, which shares extents on file systems that know how); the host
//! process copies through a large buffer where the kernel refuses. Holes of the source stay holes.

use super::stats::IoStats;
use super::transfer::{read_full, write_all, Failed};
use super::zero::{zero, Purpose};
use rustix::fd::BorrowedFd;
use rustix::fs::{copy_file_range, ftruncate, seek, SeekFrom};
use rustix::io::Errno;
use std::collections::HashSet;

/// Bytes that the kernel is asked to copy at once: between two steps the operator can interrupt.
const KERNEL_STEP: u64 = 256 << 20;
/// Bytes that the host process copies at once.
const HOST_STEP: usize = 1 << 20;
/// Holes are looked for in ranges of at least this many bytes.
const SPARSE_MINIMUM: u64 = 64 << 10;

/// One side of a copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Device number.
    pub number: u32,
    /// Byte offset.
    pub offset: u64,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// Whether it is a block device.
    pub block_device: bool,
}

/// Copies, and remembers between which devices the kernel does not.
#[derive(Debug, Default)]
pub(super) struct Copier {
    refused: HashSet<(u32, u32)>,
    buffer: Vec<u8>,
}

/// One copy on its way.
struct Job<'a> {
    from: Side<'a>,
    to: Side<'a>,
    /// Length of the target in bytes now.
    to_length: u64,
    stop: &'a dyn Fn() -> bool,
    stats: &'a mut IoStats,
}

impl Copier {
    /// A copier that never asks the kernel, for tests.
    #[cfg(test)]
    fn through_host(from: u32, to: u32) -> Self {
        Self { refused: HashSet::from([(from, to)]), buffer: Vec::new() }
    }

    /// Copy `length` bytes. What is past the end of the source is zero. The target is as long afterwards as if all bytes
    /// had been written.
    pub(super) fn copy(
        &mut self,
        from: Side<'_>,
        to: Side<'_>,
        length: u64,
        stop: &dyn Fn() -> bool,
        stats: &mut IoStats,
    ) -> Result<(), Failed> {
        let mut job = Job { from, to, to_length: to.file_length, stop, stats };
        let available = from.file_length.saturating_sub(from.offset).min(length);
        let mut at = 0;
        while at < available {
            let (data, end) = job.next_data(at, available);
            job.hole(at, data)?;
            if data < end {
                self.data(&mut job, data, end)?;
            }
            at = end;
        }
        job.hole(available, length)?;
        job.extend(length)
    }

    /// Copy the bytes `at..end` of the job.
    fn data(&mut self, job: &mut Job<'_>, mut at: u64, end: u64) -> Result<(), Failed> {
        let pair = (job.from.number, job.to.number);
        if !self.refused.contains(&pair) {
            at = job.by_kernel(at, end)?;
            if at < end && job.kernel_refuses(at) {
                self.refused.insert(pair);
            }
        }
        if at < end {
            if self.buffer.is_empty() {
                self.buffer = vec![0; HOST_STEP];
            }
            job.by_host(at, end, &mut self.buffer)?;
        }
        job.to_length = job.to_length.max(job.to.offset.saturating_add(end));
        Ok(())
    }
}

impl Job<'_> {
    /// The next data at or after `at`: where it begins and ends, both at most `end`. Without an answer from the file
    /// system everything is data.
    fn next_data(&self, at: u64, end: u64) -> (u64, u64) {
        if end - at < SPARSE_MINIMUM || self.from.block_device {
            return (at, end);
        }
        let base = self.from.offset;
        let data = match seek(self.from.fd, SeekFrom::Data(base + at)) {
            Ok(data) => data.saturating_sub(base).clamp(at, end),
            // No data up to the end of the file.
            Err(Errno::NXIO) => return (end, end),
            Err(_) => return (at, end),
        };
        match seek(self.from.fd, SeekFrom::Hole(base + data)) {
            Ok(hole) => (data, hole.saturating_sub(base).clamp(data, end)),
            Err(_) => (data, end),
        }
    }

    /// Make the bytes `at..end` of the job read as zero. What is past the end of the target does already.
    fn hole(&mut self, at: u64, end: u64) -> Result<(), Failed> {
        let start = self.to.offset.saturating_add(at);
        let stop = self.to.offset.saturating_add(end).min(self.to_length);
        if at >= end || start >= stop {
            return Ok(());
        }
        let result = zero(&self.to.fd, start, stop - start, Purpose::ReadAsZero, self.stop);
        result.map_err(|failed| Failed { done: at + failed.done, errno: failed.errno })?;
        self.stats.zeroed += stop - start;
        Ok(())
    }

    /// After a hole at the end: make the target as long as if it had been written.
    fn extend(&mut self, length: u64) -> Result<(), Failed> {
        let end = self.to.offset.saturating_add(length);
        if self.to.block_device || end <= self.to_length || length == 0 {
            return Ok(());
        }
        self.to_length = end;
        retry(|| ftruncate(self.to.fd, end)).map_err(|errno| Failed { done: length.saturating_sub(1), errno })
    }

    /// Let the kernel copy; returns how far it came before it refused.
    fn by_kernel(&mut self, mut at: u64, end: u64) -> Result<u64, Failed> {
        while at < end {
            if (self.stop)() {
                return Err(Failed { done: at, errno: Errno::INTR });
            }
            let (mut from, mut to) = (self.from.offset + at, self.to.offset + at);
            let step = usize::try_from((end - at).min(KERNEL_STEP)).unwrap_or(HOST_STEP);
            self.stats.calls += 1;
            match copy_file_range(self.from.fd, Some(&mut from), self.to.fd, Some(&mut to), step) {
                // Nothing there, although there should be: the other way will tell.
                Ok(0) => return Ok(at),
                Ok(count) => {
                    at += count as u64;
                    self.stats.kernel_copied += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) if is_refusal(errno) => return Ok(at),
                Err(errno) => return Err(Failed { done: at, errno }),
            }
        }
        Ok(at)
    }

    /// Whether the kernel refuses to copy at all, rather than having come to the end of a source that became shorter.
    fn kernel_refuses(&self, at: u64) -> bool {
        let (mut from, mut to) = (self.from.offset + at, self.to.offset + at);
        // Copying no bytes changes nothing and is refused for the same reasons.
        copy_file_range(self.from.fd, Some(&mut from), self.to.fd, Some(&mut to), 0).is_err()
    }

    /// Copy through memory of this process.
    fn by_host(&mut self, mut at: u64, end: u64, buffer: &mut [u8]) -> Result<(), Failed> {
        while at < end {
            let fail = |errno| Failed { done: at, errno };
            if (self.stop)() {
                return Err(fail(Errno::INTR));
            }
            let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let part = &mut buffer[..want];
            let count = read_full(&self.from.fd, part, self.from.offset + at).map_err(fail)?;
            self.stats.calls += 2;
            if count == 0 {
                return self.hole(at, end);
            }
            write_all(&self.to.fd, &part[..count], self.to.offset + at)
                .map_err(|failed| Failed { done: at + failed.done, errno: failed.errno })?;
            at += count as u64;
            self.to_length = self.to_length.max(self.to.offset + at);
            self.stats.host_copied += count as u64;
        }
        Ok(())
    }
}

/// Whether the kernel means "not between these two".
fn is_refusal(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM | Errno::ACCESS | Errno::TXTBSY
    )
}

/// Call until it is not interrupted.
pub(super) fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn side(file: &File, number: u32, offset: u64) -> Side<'_> {
        let file_length = file.metadata().unwrap().len();
        Side { fd: file.as_fd(), number, offset, file_length, block_device: false }
    }

    /// Pseudo-random bytes, none of them zero.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|i| u8::try_from((i * 7 + i / 251) % 255 + 1).unwrap()).collect()
    }

    fn both_ways(test: impl Fn(Copier)) {
        test(Copier::default());
        test(Copier::through_host(0, 1));
    }

    #[test]
    fn any_range_is_copied() {
        both_ways(|mut copier| {
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            let data = pattern(3 << 20);
            from.write_all_at(&data, 0).unwrap();
            to.write_all_at(&vec![0xee; 1 << 20], 0).unwrap();
            let mut stats = IoStats::default();
            let length = (2 << 20) + 77;
            copier.copy(side(&from, 0, 12_345), side(&to, 1, 999), length as u64, &|| false, &mut stats).unwrap();
            let mut expected = vec![0xee; 999];
            expected.extend(&data[12_345..12_345 + length]);
            let mut found = vec![0; expected.len() + 1];
            assert_eq!(read_full(&to, &mut found, 0), Ok(expected.len()));
            assert!(found[..expected.len()] == expected[..]);
            assert_eq!(stats.kernel_copied + stats.host_copied, length as u64);
        });
    }

    #[test]
    fn past_the_end_of_the_source_is_zero() {
        both_ways(|mut copier| {
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            from.write_all_at(&pattern(1000), 0).unwrap();
            to.write_all_at(&vec![0xee; 2500], 0).unwrap();
            let mut stats = IoStats::default();
            // 500 bytes of data, then zeroes over what was there, then past the end.
            copier.copy(side(&from, 0, 500), side(&to, 1, 1000), 4000, &|| false, &mut stats).unwrap();
            let mut expected = vec![0xee; 1000];
            expected.extend(&pattern(1000)[500..]);
            expected.resize(5000, 0);
            let mut found = vec![1; 6000];
            assert_eq!(read_full(&to, &mut found, 0), Ok(5000));
            assert!(found[..5000] == expected[..]);
            // All of it past the end.
            copier.copy(side(&from, 0, 1 << 40), side(&to, 1, 0), 100, &|| false, &mut stats).unwrap();
            assert_eq!(read_full(&to, &mut found, 0), Ok(5000));
            assert!(found[..100].iter().all(|&b| b == 0) && found[100] == 0xee);
        });
    }

    #[test]
    fn holes_stay_holes() {
        both_ways(|mut copier| {
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            let data = pattern(1 << 16);
            from.set_len(64 << 20).unwrap();
            from.write_all_at(&data, 8 << 20).unwrap();
            to.write_all_at(&vec![0xee; 16 << 20], 0).unwrap();
            let mut stats = IoStats::default();
            copier.copy(side(&from, 0, 0), side(&to, 1, 0), 64 << 20, &|| false, &mut stats).unwrap();
            assert_eq!(to.metadata().unwrap().len(), 64 << 20);
            assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
            let mut found = vec![0; 64 << 20];
            assert_eq!(read_full(&to, &mut found, 0), Ok(64 << 20));
            assert!(found[8 << 20..][..1 << 16] == data[..]);
            assert!(found[..8 << 20].iter().chain(&found[(8 << 20) + (1 << 16)..]).all(|&b| b == 0));
        });
    }

    #[test]
    fn within_one_file_and_interrupted() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&pattern(1 << 17), 0).unwrap();
        let mut stats = IoStats::default();
        let mut copier = Copier::default();
        copier.copy(side(&file, 0, 0), side(&file, 0, 1 << 17), 1 << 17, &|| false, &mut stats).unwrap();
        let mut found = vec![0; 1 << 18];
        assert_eq!(read_full(&file, &mut found, 0), Ok(1 << 18));
        assert!(found[..1 << 17] == found[1 << 17..]);
        let stopped = copier.copy(side(&file, 0, 0), side(&file, 0, 1 << 20), 100, &|| true, &mut stats);
        assert_eq!(stopped, Err(Failed { done: 0, errno: Errno::INTR }));
    }
}
