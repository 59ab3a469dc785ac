//! Any number of block requests, in doorbells of at most a ring.

use core::ops::Range;
use instar_guest_abi::{request_status, Request, RequestOp, RING_CAPACITY};

/// The ring of requests, and the bell that calls the host to execute them.
///
/// # Example
///
/// A host that counts how often it is called: more requests than the ring has room for take several doorbells.
///
/// ```
/// use core::ops::Range;
/// use instar_guest_abi::{request_status, Request, RequestOp, RING_CAPACITY};
/// use instar_guest_core::{submit, Doorbell};
///
/// struct Counter(usize);
///
/// impl Doorbell for Counter {
///     fn ring(&mut self, requests: &mut [Request]) {
///         self.0 += 1;
///         requests.iter_mut().for_each(|request| request.status = request_status::OK);
///     }
///
///     fn heap(&self) -> Range<u64> {
///         0..0
///     }
///
///     fn with_bounce(&mut self, _: usize, _: &mut dyn FnMut(&mut Self, u64)) -> bool {
///         false
///     }
///
///     unsafe fn copy(&mut self, _: u64, _: u64, _: usize) {}
/// }
///
/// let mut flushes = vec![Request { op: RequestOp::Flush as u32, ..Request::default() }; RING_CAPACITY + 1];
/// let mut bell = Counter(0);
/// // SAFETY: a flush has no buffer.
/// let done = unsafe { submit(&mut bell, &mut flushes) };
/// assert_eq!((done, bell.0), (RING_CAPACITY + 1, 2));
/// ```
pub trait Doorbell {
    /// Have the host execute `requests`, at most [`RING_CAPACITY`], and set their `status`.
    fn ring(&mut self, requests: &mut [Request]);

    /// The addresses that buffers may have.
    fn heap(&self) -> Range<u64>;

    /// Call `body` with `length` bytes of heap; `false` if there are none.
    fn with_bounce(&mut self, length: usize, body: &mut dyn FnMut(&mut Self, u64)) -> bool;

    /// Copy `length` bytes of guest memory.
    ///
    /// # Safety
    /// `from` is readable and `to` writable for `length` bytes, and they do not overlap.
    unsafe fn copy(&mut self, from: u64, to: u64, length: usize);
}

/// Largest buffer outside the heap (on the stack, in a static) that is carried through the heap.
const MAX_BOUNCE: u64 = 1 << 20;

/// Whether the host cannot reach the request's buffer, while the guest can: it is not in the heap.
fn needs_bounce(request: &Request, heap: &Range<u64>) -> bool {
    let with_buffer = request.op == RequestOp::Read as u32 || request.op == RequestOp::Write as u32;
    let end = request.buffer.saturating_add(request.length);
    with_buffer && request.length <= MAX_BOUNCE && end <= heap.start
}

/// Execute `requests` in order; stop at the first failure. Returns its index, or the number of requests.
///
/// # Safety
/// The buffers that lie outside the heap are readable (WRITE) or writable (READ).
pub unsafe fn submit<D: Doorbell>(bell: &mut D, requests: &mut [Request]) -> usize {
    for request in &mut *requests {
        request.status = request_status::NOT_RUN;
    }
    let heap = bell.heap();
    let mut done = 0;
    while let Some(rest) = requests.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let run = rest.iter().take(RING_CAPACITY).take_while(|request| !needs_bounce(request, &heap)).count();
        let failed = match (run, rest) {
            (0, [first, ..]) => {
                // SAFETY: the caller promises that the buffer is accessible.
                unsafe { bounce(bell, first) };
                (first.status != request_status::OK).then_some(0)
            }
            (_, rest) => {
                let batch = rest.get_mut(..run).unwrap_or_default();
                bell.ring(batch);
                batch.iter().position(|request| request.status != request_status::OK)
            }
        };
        if let Some(index) = failed {
            return done + index;
        }
        done += run.max(1);
    }
    requests.len()
}

/// Execute one request through a buffer in the heap.
///
/// # Safety
/// The request's buffer is readable (WRITE) or writable (READ).
unsafe fn bounce<D: Doorbell>(bell: &mut D, request: &mut Request) {
    const ENOMEM: i32 = 12;
    let (original, is_read) = (request.buffer, request.op == RequestOp::Read as u32);
    let length = usize::try_from(request.length).unwrap_or(0);
    let there = bell.with_bounce(length, &mut |bell, buffer| {
        if !is_read {
            // SAFETY: the caller promises that the buffer is readable; the other is of the same length.
            unsafe { bell.copy(original, buffer, length) };
        }
        let mut one = [*request];
        one[0].buffer = buffer;
        bell.ring(&mut one);
        request.status = one[0].status;
        if is_read && request.status == request_status::OK {
            // SAFETY: the caller promises that the buffer is writable; the other is of the same length.
            unsafe { bell.copy(buffer, original, length) };
        }
    });
    if !there {
        request.status = ENOMEM;
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    /// Memory is a vector; addresses are indices. The heap is the upper half.
    struct Host {
        memory: Vec<u8>,
        doorbells: Vec<usize>,
        fail_at_offset: u64,
        bounce_room: bool,
    }

    impl Doorbell for Host {
        fn ring(&mut self, requests: &mut [Request]) {
            self.doorbells.push(requests.len());
            for request in requests {
                if request.offset == self.fail_at_offset {
                    request.status = 5;
                    return;
                }
                request.status = request_status::OK;
                let at = usize::try_from(request.buffer).unwrap_or(0);
                let end = at + usize::try_from(request.length).unwrap_or(0);
                if request.op == RequestOp::Read as u32 {
                    assert!(self.heap().contains(&request.buffer));
                    self.memory[at..end].fill(0x77);
                } else if request.op == RequestOp::Write as u32 {
                    assert!(self.heap().contains(&request.buffer));
                    assert!(self.memory[at..end].iter().all(|&byte| byte == 0x11), "the data arrived");
                }
            }
        }
        fn heap(&self) -> Range<u64> {
            500..1000
        }
        fn with_bounce(&mut self, length: usize, body: &mut dyn FnMut(&mut Self, u64)) -> bool {
            if self.bounce_room && length <= 100 {
                body(self, 900);
            }
            self.bounce_room
        }
        unsafe fn copy(&mut self, from: u64, to: u64, length: usize) {
            let from = usize::try_from(from).unwrap_or(0);
            self.memory.copy_within(from..from + length, usize::try_from(to).unwrap_or(0));
        }
    }

    fn host() -> Host {
        Host { memory: vec![0x11; 1000], doorbells: vec![], fail_at_offset: u64::MAX, bounce_room: true }
    }

    fn zeroes(count: u64) -> Vec<Request> {
        (0..count).map(|offset| Request::zero(0, offset, 1)).collect()
    }

    fn run(host: &mut Host, requests: &mut [Request]) -> usize {
        // SAFETY: the test's memory is a vector, accessed by index.
        unsafe { submit(host, requests) }
    }

    #[test]
    fn requests_are_split_at_the_ring() {
        let mut host = host();
        let mut requests = zeroes(600);
        assert_eq!(run(&mut host, &mut requests), 600);
        assert_eq!(host.doorbells, [256, 256, 88]);
        assert!(requests.iter().all(|request| request.status == request_status::OK));
        assert_eq!(run(&mut host, &mut []), 0);
    }

    #[test]
    fn the_first_failure_stops() {
        let mut host = host();
        host.fail_at_offset = 300;
        let mut requests = zeroes(600);
        assert_eq!(run(&mut host, &mut requests), 300);
        assert_eq!(host.doorbells, [256, 256]);
        assert_eq!(requests[300].status, 5);
        assert!(requests[301..].iter().all(|request| request.status == request_status::NOT_RUN));
    }

    #[test]
    fn buffers_outside_the_heap_are_carried() {
        let mut host = host();
        let mut requests = [
            Request::read(0, 0, 600, 50),
            Request::write(0, 1, 10, 50),
            Request::read(0, 2, 100, 50),
            Request::zero(0, 3, 50),
        ];
        assert_eq!(run(&mut host, &mut requests), 4);
        assert_eq!(host.doorbells, [1, 1, 1, 1]);
        assert!(host.memory[100..150].iter().all(|&byte| byte == 0x77));
        assert_eq!(requests[2].buffer, 100, "the caller's request is as it was");
    }

    #[test]
    fn without_room_the_request_fails() {
        let mut host = host();
        host.bounce_room = false;
        let mut requests = [Request::zero(0, 0, 1), Request::read(0, 0, 10, 50)];
        assert_eq!(run(&mut host, &mut requests), 1);
        assert_eq!(requests[1].status, 12);
    }
}
