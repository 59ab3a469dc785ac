//! Making ranges read as zero, and giving space back.

use super::transfer::{write_all, Failed};
use rustix::fd::AsFd;
use rustix::fs::{fallocate, FallocateFlags};
use rustix::io::Errno;

/// Zeroes that are written at once where the file system has no holes.
const CHUNK: usize = 1 << 20;

/// What the point of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The range must read as zero afterwards.
    ReadAsZero,
    /// The space is given back if that is possible; what the range reads as does not matter.
    GiveBack,
}

/// Whether the host means "not like this", so that another way is worth a try.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM | Errno::NODEV | Errno::TXTBSY)
}

/// Zero `length` bytes at `offset`, all within the file: its length stays. `stop` is asked between long steps.
pub(super) fn zero(
    fd: &impl AsFd,
    offset: u64,
    length: u64,
    purpose: Purpose,
    stop: &dyn Fn() -> bool,
) -> Result<(), Failed> {
    if length == 0 {
        return Ok(());
    }
    let modes = [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE];
    let modes = if purpose == Purpose::GiveBack { &modes[..1] } else { &modes[..] };
    for &mode in modes {
        loop {
            match fallocate(fd, mode | FallocateFlags::KEEP_SIZE, offset, length) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) if stop() => return Err(Failed { done: 0, errno: Errno::INTR }),
                Err(Errno::INTR) => {}
                Err(errno) if is_unsupported(errno) => break,
                Err(errno) => return Err(Failed { done: 0, errno }),
            }
        }
    }
    if purpose == Purpose::GiveBack {
        return Ok(());
    }
    write_zeroes(fd, offset, length, stop)
}

/// Write them out.
fn write_zeroes(fd: &impl AsFd, offset: u64, length: u64, stop: &dyn Fn() -> bool) -> Result<(), Failed> {
    let zeroes = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(CHUNK)];
    let mut done = 0;
    while done < length {
        if stop() {
            return Err(Failed { done, errno: Errno::INTR });
        }
        let count = usize::try_from(length - done).unwrap_or(usize::MAX).min(zeroes.len());
        write_all(fd, &zeroes[..count], offset + done)
            .map_err(|failed| Failed { done: done + failed.done, errno: failed.errno })?;
        done += count as u64;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zeroes_keep_length_and_neighbours() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let run = |f: &dyn Fn()| {
            std::fs::write(file.path(), vec![0xaa; 3 << 20]).unwrap();
            f();
            let bytes = std::fs::read(file.path()).unwrap();
            assert_eq!(bytes.len(), 3 << 20);
            assert!(bytes[1000..2_500_001].iter().all(|&b| b == 0));
            assert!(bytes[..1000].iter().chain(&bytes[2_500_001..]).all(|&b| b == 0xaa));
        };
        run(&|| zero(file.as_file(), 1000, 2_499_001, Purpose::ReadAsZero, &|| false).unwrap());
        assert!(file.as_file().metadata().unwrap().blocks() * 512 < 2 << 20);
        run(&|| write_zeroes(file.as_file(), 1000, 2_499_001, &|| false).unwrap());
        let stopped = write_zeroes(file.as_file(), 0, 1 << 20, &|| true);
        assert_eq!(stopped, Err(Failed { done: 0, errno: Errno::INTR }));
    }
}
