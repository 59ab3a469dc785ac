//! The run loop of every sandbox: run the guest and serve its requests until it is done or has to be ended.

use super::error::{printable, SandboxError};
use super::host::{BufferAccess, Excess, Host};
use super::layout::Layout;
use super::memory::GuestRam;
use super::messages::Messages;
use super::placed::{place, Placed};
use super::plain::{bytes, bytes_mut};
use super::program::{Program, Report};
use instar_guest_abi::{
    request_status, Request, PORT_DOORBELL, PORT_EXIT, PORT_JOIN, PORT_MESSAGE, PORT_WAKE, RING_ADDR, RING_CAPACITY,
};
use std::ops::Range;
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;

/// The reason why the guest stopped.
#[derive(Debug)]
pub enum Exit {
    /// None of the guest's: time has passed, or a signal came.
    Nothing,
    /// The guest sent this value on this port.
    Out(u16, u32),
    /// The guest cannot continue.
    Ended(SandboxError),
}

/// What runs the guest's code: its main processor, and the workers besides.
pub trait Processor {
    /// Let the guest run until it wants something, and for a part of a second at most. If it was told something before that is
    /// done now, it goes on from there.
    ///
    /// # Errors
    /// The sandbox failed.
    fn enter(&mut self) -> Result<Exit, SandboxError>;

    /// The processor time that the guest has used, its workers included.
    fn used(&self) -> Duration;

    /// Let this number of workers go on.
    ///
    /// # Errors
    /// [`SandboxError::GuestProtocol`] if there are not so many, or one is at work; the sandbox failed.
    fn wake(&mut self, workers: u32) -> Result<(), SandboxError>;

    /// Let the guest go on only when all workers are idle.
    fn join(&mut self);

    /// The guest is done: say what is wrong with its workers.
    ///
    /// # Errors
    /// [`SandboxError::GuestProtocol`] if one is at work; why one was ended.
    fn finish(&mut self) -> Result<(), SandboxError>;

    /// Where a guest is that is not to go on.
    ///
    /// # Errors
    /// The sandbox failed.
    fn position(&mut self) -> Result<u64, SandboxError>;

    /// The privilege level of the guest's code.
    ///
    /// # Errors
    /// The sandbox failed.
    fn ring(&self) -> Result<u8, SandboxError>;
}

/// A guest: its memory, the layout of that, and its limits.
#[derive(Debug)]
pub struct Guest {
    /// Its memory.
    pub ram: GuestRam,
    /// What is where.
    pub layout: Layout,
    stall_limit: Duration,
    message_limit: u64,
}

impl Guest {
    /// With the limits of this program.
    pub fn new(ram: GuestRam, layout: Layout, program: &Program<'_>) -> Self {
        Self { ram, layout, stall_limit: program.stall_limit, message_limit: program.message_limit }
    }

    /// Return the processor time that it may use without a request.
    pub fn stall_limit(&self) -> Duration {
        self.stall_limit
    }

    /// Where the modules are.
    pub fn modules(&self) -> &[Placed] {
        &self.layout.modules
    }

    /// Run it until it exits; `report` has the durations so far.
    ///
    /// # Errors
    /// Why it was ended.
    pub fn run(
        &self,
        processor: &mut dyn Processor,
        mut report: Report,
        host: &mut dyn Host,
    ) -> Result<Report, SandboxError> {
        let mut messages = Messages::new(self.message_limit);
        let started = Instant::now();
        // The processor time when the guest last wanted something.
        let mut wanted = processor.used();
        loop {
            let entered = Instant::now();
            let exit = processor.enter()?;
            let outside = Instant::now();
            report.time_guest += outside - entered;
            if report.exits == 0 && !matches!(exit, Exit::Nothing) {
                report.time_first_exit = outside - started;
                report.ring = processor.ring()?;
            }
            // To share work among workers is no request: a guest that does nothing else makes no progress.
            let idle = matches!(exit, Exit::Nothing | Exit::Out(PORT_WAKE | PORT_JOIN, _));
            // Not at a message or the end: what the guest has done is then reported.
            let may_stop = idle || matches!(exit, Exit::Out(PORT_DOORBELL, _));
            if may_stop && host.interrupted() {
                return Err(SandboxError::Interrupted);
            }
            let used = processor.used();
            if idle && used.saturating_sub(wanted) > self.stall_limit {
                let time = u64::try_from(used.saturating_sub(wanted).as_millis()).unwrap_or(u64::MAX);
                let place = place(self.modules(), processor.position()?);
                return Err(SandboxError::GuestStalled { time, place });
            }
            if let Some(Excess { device, text }) = host.excess(used).filter(|_| may_stop) {
                return Err(SandboxError::LimitExceeded { device, text });
            }
            match exit {
                Exit::Out(PORT_WAKE, workers) => {
                    processor.wake(workers)?;
                    report.workers = report.workers.max(usize::try_from(workers).unwrap_or(0));
                }
                Exit::Out(PORT_JOIN, _) => processor.join(),
                _ => {}
            }
            if idle {
                continue;
            }
            wanted = used;
            report.exits += 1;
            match exit {
                Exit::Nothing => {}
                Exit::Out(PORT_DOORBELL, count) => {
                    self.doorbell(count, &mut report, host)?;
                    // Now, too: a request that was cut short failed, and the guest would report that failure.
                    if host.interrupted() {
                        return Err(SandboxError::Interrupted);
                    }
                }
                Exit::Out(PORT_MESSAGE, length) => messages.take(&self.ram, self.modules(), length, host)?,
                Exit::Out(PORT_EXIT, _) => {
                    processor.finish()?;
                    report.messages = messages.count;
                    report.time_run = started.elapsed();
                    return Ok(report);
                }
                Exit::Out(port, _) => {
                    return Err(SandboxError::protocol(format!("`out` to unassigned port {port:#x}")));
                }
                Exit::Ended(error) => return Err(error),
            }
        }
    }

    /// Execute the first `count` requests of the ring. The host works on a copy: the guest cannot change a request after it
    /// was checked, even where it goes on meanwhile.
    fn doorbell(&self, count: u32, report: &mut Report, host: &mut dyn Host) -> Result<(), SandboxError> {
        let length = usize::try_from(count).unwrap_or(usize::MAX);
        if length == 0 || length > RING_CAPACITY {
            return Err(SandboxError::protocol(format!(
                "a doorbell for {count} requests, 1 to {RING_CAPACITY} are possible"
            )));
        }
        report.doorbells += 1;
        report.requests += u64::from(count);
        let mut requests = vec![Request::default(); length];
        if !self.ram.read(RING_ADDR, bytes_mut(&mut requests)) {
            return Err(SandboxError::protocol("a ring outside memory"));
        }
        for request in &mut requests {
            request.status = request_status::NOT_RUN;
        }
        let heap = HeapBuffers { ram: &self.ram, range: &self.layout.heap };
        if let Err(bad) = host.requests(&heap, &mut requests) {
            // The one that breaks a rule is the first that was not executed.
            let culprit = requests.iter().find(|request| request.status == request_status::NOT_RUN);
            let place = place(self.modules(), culprit.map_or(0, |request| request.caller));
            return Err(SandboxError::protocol(format!("{} (asked for by {place})", printable(&bad.0))));
        }
        if !self.ram.write(RING_ADDR, bytes(&requests)) {
            return Err(SandboxError::protocol("a ring outside memory"));
        }
        Ok(())
    }
}

/// The buffers that requests may name.
struct HeapBuffers<'a> {
    ram: &'a GuestRam,
    range: &'a Range<u64>,
}

impl BufferAccess for HeapBuffers<'_> {
    fn heap_slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let end = address.checked_add(length)?;
        if address < self.range.start || end > self.range.end {
            return None;
        }
        self.ram.slice(address, length)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_the_heap_is_reachable() {
        let ram = GuestRam::new().unwrap();
        let range = 0x20_0000..0x40_0000;
        let heap = HeapBuffers { ram: &ram, range: &range };
        assert!(heap.heap_slice(0x20_0000, 0x20_0000).is_some());
        assert!(heap.heap_slice(0x20_0000, 0x20_0001).is_none());
        assert!(heap.heap_slice(0x1f_ffff, 2).is_none());
        assert!(heap.heap_slice(u64::MAX, 2).is_none());
    }
}
