//! Batches of requests: an exit of the guest costs far more than a request, so a driver collects requests before it submits
//! them.

use crate::error::DriverResult;
use crate::io::BlockIo;
use crate::ordered::OrderedWriter;
use alloc::vec::Vec;
use instar_guest_abi::{Request, RequestOp};

/// A sequence of requests, in which a request that continues the one before it is merged into it.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    requests: Vec<Request>,
}

/// Whether `next` continues `last`, so that one longer request does both.
fn goes_on(last: &Request, next: &Request) -> bool {
    let follows = |from: u64, to: u64| from.checked_add(last.length) == Some(to);
    let same =
        (last.op, last.flags, last.device, last.src_device) == (next.op, next.flags, next.device, next.src_device);
    same && follows(last.offset, next.offset)
        && match RequestOp::from_u32(next.op) {
            Some(RequestOp::Copy) => follows(last.src_offset, next.src_offset),
            Some(RequestOp::Write | RequestOp::Read) => follows(last.buffer, next.buffer),
            Some(RequestOp::Zero) => true,
            _ => false,
        }
}

impl Batch {
    /// Make an empty batch.
    #[must_use]
    pub const fn new() -> Self {
        Self { requests: Vec::new() }
    }

    /// Append a request. The buffer that it names has to stay alive until the batch is submitted.
    pub fn push(&mut self, request: Request) {
        match self.requests.last_mut() {
            Some(last) if goes_on(last, &request) => last.length = last.length.saturating_add(request.length),
            _ => self.requests.push(request),
        }
    }

    /// Count the requests.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether the batch is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Submit all requests in one call and empty the batch. Does nothing for an empty batch.
    ///
    /// # Errors
    /// As [`BlockIo::run`]. Some of the requests may have been executed; the batch is emptied nevertheless.
    pub fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let mut requests = core::mem::take(&mut self.requests);
        if requests.is_empty() {
            return Ok(());
        }
        io.run(&mut requests)
    }

    /// [`Batch::submit`] for requests that change the device of `out`, and tell `out` that a flush is due.
    ///
    /// # Errors
    /// As [`Batch::submit`].
    pub fn submit_to(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        out.run(io, &mut core::mem::take(&mut self.requests))
    }
}

#[cfg(all(test, feature = "memory"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::MemoryDevices;
    use alloc::vec;
    use instar_guest_abi::{Phase, DEVICE_OUTPUT};

    #[test]
    fn requests_that_go_on_are_one() {
        let pairs = [
            (Request::copy(1, 0, 2, 100, 10), Request::copy(1, 10, 2, 110, 5), true),
            (Request::copy(1, 0, 2, 100, 10), Request::copy(1, 11, 2, 110, 5), false),
            (Request::copy(1, 0, 2, 100, 10), Request::copy(3, 10, 2, 110, 5), false),
            (Request::write(2, 100, 64, 10), Request::write(2, 110, 74, 5), true),
            (Request::write(2, 100, 64, 10), Request::write(2, 110, 75, 5), false),
            (Request::zero(2, 100, 10), Request::zero(2, 110, 5), true),
            (Request::zero(2, 100, 10), Request::zero(2, 111, 5), false),
            (Request::zero(2, 100, 10), Request::discard(2, 110, 5), false),
            (Request::flush(2), Request::flush(2), false),
            (Request::set_length(2, 0), Request::set_length(2, 0), false),
        ];
        for (first, second, one) in pairs {
            let mut batch = Batch::new();
            batch.push(first);
            batch.push(second);
            assert_eq!(batch.len(), if one { 1 } else { 2 }, "{first:?} {second:?}");
        }
    }

    #[test]
    fn a_batch_is_submitted_once_and_a_flush_is_due() {
        let mut io = MemoryDevices::new([(DEVICE_OUTPUT, vec![7; 16])]);
        io.enter(Phase::Target);
        let (mut batch, mut out) = (Batch::new(), OrderedWriter::new(DEVICE_OUTPUT));
        batch.submit_to(&mut io, &mut out).unwrap();
        assert!(!out.is_unflushed());
        batch.push(Request::zero(DEVICE_OUTPUT, 0, 4));
        batch.push(Request::zero(DEVICE_OUTPUT, 4, 4));
        batch.submit_to(&mut io, &mut out).unwrap();
        batch.submit(&mut io).unwrap();
        assert!(out.is_unflushed() && batch.is_empty());
        assert_eq!((io.submits, io.executed()), (1, 1));
        assert_eq!(io.files[&DEVICE_OUTPUT], [[0; 8], [7; 8]].concat());
    }
}
