//! Requests that are collected before they are submitted: an exit of the guest costs far more than a request.

use crate::error::DriverResult;
use crate::io::BlockIo;
use crate::ordered::OrderedWriter;
use alloc::vec::Vec;
use instar_guest_abi::{Request, RequestOp};

/// Requests in order, each one merged with the one before it where it goes on from that.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    requests: Vec<Request>,
}

/// Whether `next` does what `last` does, behind it: then one longer request does both.
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
    /// Nothing to do.
    #[must_use]
    pub const fn new() -> Self {
        Self { requests: Vec::new() }
    }

    /// Add a request behind the others. The buffer that it names stays alive until the batch was submitted.
    pub fn push(&mut self, request: Request) {
        match self.requests.last_mut() {
            Some(last) if goes_on(last, &request) => last.length = last.length.saturating_add(request.length),
            _ => self.requests.push(request),
        }
    }

    /// How many requests there are by now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Submit everything, in one call; then the batch is empty. Nothing happens if it was before.
    ///
    /// # Errors
    /// As [`BlockIo::run`]. Some of the requests may have been executed; the batch is empty all the same.
    pub fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let mut requests = core::mem::take(&mut self.requests);
        if requests.is_empty() {
            return Ok(());
        }
        io.run(&mut requests)
    }

    /// [`Batch::submit`] of requests that change the device of `out`, which knows then that a flush is due.
    ///
    /// # Errors
    /// As [`Batch::submit`].
    pub fn submit_to(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        out.run(io, &mut core::mem::take(&mut self.requests))
    }
}
