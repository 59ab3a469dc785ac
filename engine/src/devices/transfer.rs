//! Between a file and guest memory: without a copy in between, but for direct I/O, which needs aligned buffers.

use super::merge::Batch;
use super::Device;
use crate::sandbox::BufferAccess;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::VolatileSlice;

/// Bytes that one direct read or write moves at most.
const DIRECT_BYTES: usize = 1 << 20;

/// The buffers of a batch, from byte `skip` on.
fn buffers<'a>(memory: &'a dyn BufferAccess, batch: &Batch, mut skip: u64) -> io::Result<Vec<VolatileSlice<'a>>> {
    let outside = || io::Error::from_raw_os_error(libc::EFAULT);
    let mut slices = Vec::with_capacity(batch.buffers.len());
    for &(address, length) in &batch.buffers {
        let skipped = skip.min(length);
        skip -= skipped;
        if skipped < length {
            let start = address.checked_add(skipped).ok_or_else(outside)?;
            slices.push(memory.heap_slice(start, length - skipped).ok_or_else(outside)?);
        }
    }
    Ok(slices)
}

/// The direction of a transfer: `preadv` or `pwritev`.
type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// One system call from byte `done` of the batch on; returns how many bytes it moved.
fn call_once(call: Call, file: &File, memory: &dyn BufferAccess, batch: &Batch, done: u64) -> io::Result<u64> {
    let slices = buffers(memory, batch, done)?;
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<libc::iovec> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| invalid())?;
    let offset = libc::off_t::try_from(batch.whole.offset + done).map_err(|_| invalid())?;
    // SAFETY: the vectors name guest memory that the guards keep mapped. A guest in a process may change it meanwhile: the kernel
    // moves whatever bytes are there.
    let moved = unsafe { call(file.as_raw_fd(), vectors.as_ptr(), count, offset) };
    u64::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Read a batch; what lies past the end of the file reads as zero.
pub fn read(device: &Device, memory: &dyn BufferAccess, batch: &Batch) -> io::Result<()> {
    if device.direct.is_some() {
        return through_host(memory, batch, &mut |slice, offset| {
            let mut bytes = vec![0; slice.len()];
            let length = device.read_at(offset, &mut bytes)?;
            bytes[length..].fill(0);
            slice.copy_from(&bytes);
            Ok(())
        });
    }
    let (file, mut done) = (&device.file, 0);
    while done < batch.whole.length {
        match call_once(libc::preadv, file, memory, batch, done) {
            Ok(0) => {
                for slice in buffers(memory, batch, done)? {
                    let guard = slice.ptr_guard_mut();
                    // SAFETY: the guard keeps these bytes of guest memory mapped, and no reference to them exists. What a guest
                    // in a process does with them meanwhile is of its own making.
                    unsafe { std::ptr::write_bytes(guard.as_ptr(), 0, guard.len()) };
                }
                return Ok(());
            }
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Hand every buffer of a batch to `each`, in pieces, with its offset on the device.
fn through_host(
    memory: &dyn BufferAccess,
    batch: &Batch,
    each: &mut dyn FnMut(&VolatileSlice<'_>, u64) -> io::Result<()>,
) -> io::Result<()> {
    let outside = |_| io::Error::from_raw_os_error(libc::EFAULT);
    let mut offset = batch.whole.offset;
    for slice in buffers(memory, batch, 0)? {
        let mut done = 0;
        while done < slice.len() {
            let piece = slice.subslice(done, DIRECT_BYTES.min(slice.len() - done)).map_err(outside)?;
            each(&piece, offset)?;
            done += piece.len();
            offset += piece.len() as u64;
        }
    }
    Ok(())
}

/// Whether all bytes of a batch are zero.
pub fn is_zero(memory: &dyn BufferAccess, batch: &Batch) -> io::Result<bool> {
    let (mut zero, mut bytes) = (true, Vec::new());
    through_host(memory, batch, &mut |slice, _| {
        if zero {
            bytes.resize(slice.len(), 0);
            slice.copy_to(&mut bytes);
            zero = bytes.iter().all(|&byte| byte == 0);
        }
        Ok(())
    })?;
    Ok(zero)
}

/// Write a batch, all of it.
pub fn write(device: &Device, memory: &dyn BufferAccess, batch: &Batch) -> io::Result<()> {
    if device.direct.is_some() {
        return through_host(memory, batch, &mut |slice, offset| {
            let mut bytes = vec![0; slice.len()];
            slice.copy_to(&mut bytes);
            device.write_all_at(offset, &bytes)
        });
    }
    device.note_data(batch.whole.offset, batch.whole.length);
    let (file, mut done) = (&device.file, 0);
    while done < batch.whole.length {
        match call_once(libc::pwritev, file, memory, batch, done) {
            // A write of nothing would be tried for ever.
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
