//! Copying between files: within the kernel where it can, through a buffer where it cannot.

use super::statistics::Statistics;
use super::{retry, zero};
use instar_guest_abi::Request;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of the buffer that data passes through where the kernel does not copy.
const BUFFER: usize = 1 << 20;
/// Bytes that one `copy_file_range` is asked for at most.
const CHUNK: u64 = 1 << 30;

/// Copies, and remembers between which devices the kernel does not.
#[derive(Debug, Default)]
pub struct Copier {
    not_in_kernel: HashSet<(u32, u32)>,
    buffer: Vec<u8>,
}

/// Errors of `copy_file_range` that mean "not between these two files" (copy_file_range(2)).
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EXDEV | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS | libc::EBADF | libc::ETXTBSY | libc::EPERM)
    )
}

impl Copier {
    /// Do not try the kernel between these devices.
    #[cfg(test)]
    pub fn refuse_kernel(&mut self, source: u32, target: u32) {
        self.not_in_kernel.insert((source, target));
    }

    /// Copy what the request says from the first file to the second; `key` stands for the pair of devices. What lies
    /// past the end of the source reads as zero.
    pub fn copy(
        &mut self,
        key: (u32, u32),
        (source, target): (&File, &File),
        request: &Request,
        statistics: &mut Statistics,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < request.length && !self.not_in_kernel.contains(&key) {
            let (mut from, mut to) = (request.src_offset + done, request.offset + done);
            let length = usize::try_from((request.length - done).min(CHUNK)).unwrap_or(BUFFER);
            match retry(|| rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), length)) {
                Ok(0) => return zero_tail(target, request, done),
                Ok(copied) => {
                    done += copied as u64;
                    statistics.copied_in_kernel += copied as u64;
                }
                Err(error) if is_refusal(&error) => {
                    self.not_in_kernel.insert(key);
                }
                Err(error) => return Err(error),
            }
        }
        self.copy_through_buffer((source, target), request, done, statistics)
    }

    fn copy_through_buffer(
        &mut self,
        (source, target): (&File, &File),
        request: &Request,
        mut done: u64,
        statistics: &mut Statistics,
    ) -> io::Result<()> {
        if done < request.length {
            self.buffer.resize(BUFFER, 0);
        }
        while done < request.length {
            let want = usize::try_from((request.length - done).min(BUFFER as u64)).unwrap_or(BUFFER);
            let bytes = &mut self.buffer[..want];
            match source.read_at(bytes, request.src_offset + done) {
                Ok(0) => return zero_tail(target, request, done),
                Ok(length) => {
                    target.write_all_at(&bytes[..length], request.offset + done)?;
                    done += length as u64;
                    statistics.copied_through_host += length as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The source ended: the rest of the target reads as zero, and is there.
fn zero_tail(target: &File, request: &Request, done: u64) -> io::Result<()> {
    let (start, end) = (request.offset + done, request.offset + request.length);
    let length = target.metadata()?.len();
    zero::zero(target, start, end.min(length.max(start)) - start, false)?;
    if length < end && target.metadata()?.is_file() {
        retry(|| rustix::fs::ftruncate(target, end))?;
    }
    Ok(())
}
