//! Neighboring requests that are one operation.

use crate::sandbox::BadRequest;
use instar_guest_abi::{Request, RequestOp};

/// Buffers that one system call takes at most.
const MAX_BUFFERS: usize = 64;

/// One operation: a request, or several that continue each other on the same device.
#[derive(Debug)]
pub struct Batch {
    /// The operation.
    pub op: RequestOp,
    /// The first request, with the combined length.
    pub whole: Request,
    /// Address and length of each request's buffer.
    pub buffers: Vec<(u64, u64)>,
}

impl Batch {
    /// Take the batch at the beginning of `requests`, which must not be empty. Each of its requests is checked.
    ///
    /// # Errors
    /// What `check` says of the first request. A later one that breaks a rule ends the batch: it is met again.
    pub fn take(
        requests: &[Request],
        check: impl Fn(&Request) -> Result<RequestOp, BadRequest>,
    ) -> Result<Self, BadRequest> {
        let Some((first, rest)) = requests.split_first() else {
            return Err(BadRequest("a batch without requests".to_owned()));
        };
        let op = check(first)?;
        let mut batch = Self { op, whole: *first, buffers: vec![(first.buffer, first.length)] };
        for request in rest {
            if batch.buffers.len() >= MAX_BUFFERS || !batch.goes_on(request) || check(request).is_err() {
                break;
            }
            batch.whole.length += request.length;
            batch.buffers.push((request.buffer, request.length));
        }
        Ok(batch)
    }

    /// Take the copies at the beginning of `requests` that can run at the same time: `first`, a copy between two devices, and
    /// the following ones into the same device at ascending offsets. Each is checked.
    pub fn parallel(
        first: Self,
        requests: &[Request],
        check: impl Fn(&Request) -> Result<RequestOp, BadRequest>,
    ) -> Vec<Self> {
        let mut at = first.count();
        let mut group = vec![first];
        while let (Some(last), Some(rest)) = (group.last(), requests.get(at..).filter(|rest| !rest.is_empty())) {
            let end = last.whole.offset.saturating_add(last.whole.length);
            let device = last.whole.device;
            // What breaks a rule is met again.
            let Ok(next) = Self::take(rest, &check) else { break };
            if !next.copies_between_two() || next.whole.device != device || next.whole.offset < end {
                break;
            }
            at += next.count();
            group.push(next);
        }
        group
    }

    /// Whether it copies from one device to another.
    pub fn copies_between_two(&self) -> bool {
        self.op == RequestOp::Copy && self.whole.device != self.whole.src_device
    }

    /// Number of requests.
    pub fn count(&self) -> usize {
        self.buffers.len()
    }

    fn goes_on(&self, next: &Request) -> bool {
        let whole = &self.whole;
        let same = whole.op == next.op && whole.flags == next.flags && whole.device == next.device;
        let follows = whole.offset.checked_add(whole.length) == Some(next.offset);
        let source_follows = || {
            let source = whole.src_offset.checked_add(whole.length);
            whole.src_device == next.src_device && source == Some(next.src_offset)
        };
        match self.op {
            RequestOp::Read | RequestOp::Write | RequestOp::Zero => same && follows,
            // Within one device, ranges that do not overlap one by one may overlap together.
            RequestOp::Copy => same && follows && whole.device != whole.src_device && source_follows(),
            RequestOp::Flush | RequestOp::SetLength | RequestOp::NextData | RequestOp::Length => false,
        }
    }
}
