//! Block I/O as a driver sees it.

use crate::error::{DriverError, DriverResult};
use alloc::format;
use alloc::string::String;
use core::ops::Range;
use instar_guest_abi::{ErrorCode, Phase, Request, RequestOp, DEVICE_OUTPUT};

/// A request that the host tried and that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFailure {
    /// Index of the request in the batch; the requests before it were executed, those after it were not.
    pub index: usize,
    /// errno of the host.
    pub errno: u32,
}

/// Executes block requests.
///
/// In the guest this is the ring; in host tests it is a set of in-memory devices.
///
/// # Example
///
/// Make a record durable before writing the reference to it:
///
/// ```
/// use instar_guest_sdk::{BlockIo, DriverResult};
///
/// fn append(io: &mut dyn BlockIo, device: u32, end: u64, record: &[u8]) -> DriverResult<()> {
///     io.write(device, end, record)?;
///     // A crash before the second write leaves a record that nothing refers to.
///     io.flush(device)?;
///     io.write(device, 16, &end.to_le_bytes())?;
///     io.flush(device)
/// }
/// ```
pub trait BlockIo {
    /// Execute `requests` strictly in order; stop at the first failure. Buffers are named by address: the
    /// caller keeps them alive, and exclusive for READ, until this returns.
    ///
    /// # Errors
    /// The first request that failed.
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), IoFailure>;

    /// Return the bytes of heap that are free now, which bound what a driver may take.
    fn heap_free(&self) -> usize;

    /// Enter a phase, in which the devices that belong to it may be changed. Only the operation calls this; the host ends a
    /// guest that enters a phase too early, or changes a device before its phase.
    fn enter(&mut self, phase: Phase) {
        let _ = phase;
    }

    /// Call [`BlockIo::submit`], and turn a failure into a [`DriverError`] that names device and offset.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`] for ENOSPC and EDQUOT, [`ErrorCode::BackingIo`] for the output device,
    /// [`ErrorCode::OverlayIo`] for every other device.
    fn run(&mut self, requests: &mut [Request]) -> DriverResult<()> {
        const ENOSPC: u32 = 28;
        const EDQUOT: u32 = 122;
        self.submit(requests).map_err(|failure| {
            let request = requests.get(failure.index).copied().unwrap_or_default();
            let code = match failure.errno {
                ENOSPC | EDQUOT => ErrorCode::NoSpace,
                _ if request.device == DEVICE_OUTPUT => ErrorCode::BackingIo,
                _ => ErrorCode::OverlayIo,
            };
            let verb = match RequestOp::from_u32(request.op) {
                Some(RequestOp::Read) => "read",
                Some(RequestOp::Write) => "write",
                Some(RequestOp::Copy) => "copy",
                Some(RequestOp::Zero) => "zeroing",
                Some(RequestOp::Flush) => "flush",
                Some(RequestOp::SetLength) => "change of length",
                Some(RequestOp::NextData) => "search for data",
                Some(RequestOp::Length) => "question for the length",
                None => "request",
            };
            let text = match RequestOp::from_u32(request.op) {
                Some(RequestOp::SetLength) => format!("change of length to {} bytes failed", request.offset),
                Some(RequestOp::Flush) => String::from("flush failed"),
                _ => format!("{verb} of {} bytes failed", request.length),
            };
            let mut error = DriverError::new(code, text).at(request.device, request.offset);
            error.errno = failure.errno;
            error
        })
    }

    /// Read `buffer.len()` bytes at `offset`; bytes past the end of the device read as zero.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    fn read(&mut self, device: u32, offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        let address = buffer.as_mut_ptr() as u64;
        self.run(&mut [Request::read(device, offset, address, buffer.len() as u64)])
    }

    /// Write `buffer` at `offset`.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    fn write(&mut self, device: u32, offset: u64, buffer: &[u8]) -> DriverResult<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        let address = buffer.as_ptr() as u64;
        self.run(&mut [Request::write(device, offset, address, buffer.len() as u64)])
    }

    /// Find the first data of `device` within `range` (bytes), and return the part of the range that it takes, empty if the
    /// whole range is a hole. Returns the range itself if nothing is known about holes.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    fn next_data(&mut self, device: u32, range: Range<u64>) -> DriverResult<Range<u64>> {
        let mut requests = [Request::next_data(device, range.start, range.end.saturating_sub(range.start))];
        self.run(&mut requests)?;
        Ok(requests[0].offset..requests[0].offset.saturating_add(requests[0].length))
    }

    /// Return the current length of `device` in bytes, which writes may have increased since the file was opened.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    fn length(&mut self, device: u32) -> DriverResult<u64> {
        let mut requests = [Request::length_of(device)];
        self.run(&mut requests)?;
        Ok(requests[0].length)
    }

    /// Make everything written to `device` durable.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    fn flush(&mut self, device: u32) -> DriverResult<()> {
        self.run(&mut [Request::flush(device)])
    }
}
