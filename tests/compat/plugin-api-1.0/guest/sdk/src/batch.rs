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
