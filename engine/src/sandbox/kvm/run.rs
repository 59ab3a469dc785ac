//! The run loop: enter the guest, serve what it asks for, until it is done or has to be ended.

use super::machine::Machine;
use super::watchdog::Watchdog;
use super::x86::fault;
use super::x86::system::VECTORS;
use crate::sandbox::error::{printable, SandboxError};
use crate::sandbox::host::{BufferAccess, Excess, Host};
use crate::sandbox::memory::GuestRam;
use crate::sandbox::messages::Messages;
use crate::sandbox::placed::place;
use crate::sandbox::plain::{bytes, bytes_mut};
use crate::sandbox::program::Report;
use instar_guest_abi::{Request, PORT_DOORBELL, PORT_EXIT, PORT_FAULT, PORT_MESSAGE, RING_ADDR, RING_CAPACITY};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::ops::Range;
use std::time::Instant;
use vm_memory::VolatileSlice;

/// Why the guest came out.
enum Exit {
    /// A signal; the guest asked for nothing.
    Signal,
    /// `out` of 32 bits.
    Out(u16, u32),
    /// `out` of 8 bits.
    OutByte(u16, u8),
    /// Anything else that the guest can cause.
    Forbidden(String),
    /// KVM gave up.
    Kvm(String, i32),
}

fn enter(vcpu: &mut VcpuFd) -> Exit {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, &[a, b, c, d])) => Exit::Out(port, u32::from_le_bytes([a, b, c, d])),
        Ok(VcpuExit::IoOut(port, &[byte])) => Exit::OutByte(port, byte),
        Ok(VcpuExit::IoOut(port, data)) => Exit::Forbidden(format!("`out` of {} bytes to port {port:#x}", data.len())),
        Ok(VcpuExit::IoIn(port, _)) => Exit::Forbidden(format!("`in` from port {port:#x}")),
        Ok(VcpuExit::MmioRead(address, _)) => {
            Exit::Forbidden(format!("a read of address {address:#x}, which is no memory"))
        }
        Ok(VcpuExit::MmioWrite(address, _)) => {
            Exit::Forbidden(format!("a write to address {address:#x}, which is no memory"))
        }
        Ok(VcpuExit::Shutdown) => Exit::Forbidden("a triple fault".to_owned()),
        Ok(VcpuExit::Hlt) => Exit::Forbidden("a halt".to_owned()),
        Ok(VcpuExit::Intr) => Exit::Signal,
        Ok(VcpuExit::FailEntry(reason, _)) => Exit::Kvm(format!("entering the guest (reason {reason:#x})"), 0),
        Ok(VcpuExit::InternalError) => Exit::Kvm("KVM_RUN (internal error)".to_owned(), 0),
        Ok(other) => Exit::Forbidden(format!("an exit that is not expected: {other:?}")),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Signal,
        Err(error) => Exit::Kvm("KVM_RUN".to_owned(), error.errno()),
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

impl Machine {
    /// Run it until it exits.
    ///
    /// # Errors
    /// Why it was ended.
    pub fn run(mut self, handler: &mut dyn Host) -> Result<Report, SandboxError> {
        let mut watchdog = Watchdog::new(self.stall_limit)?;
        let mut messages = Messages::new(self.message_limit);
        let started = Instant::now();
        loop {
            let entered = Instant::now();
            watchdog.enter();
            let exit = enter(&mut self.vcpu);
            watchdog.leave(!matches!(exit, Exit::Signal));
            let outside = Instant::now();
            self.report.time_guest += outside - entered;
            if self.report.exits == 0 && !matches!(exit, Exit::Signal) {
                self.report.time_first_exit = outside - started;
                self.report.ring = self.ring()?;
            }
            // Not at a message or the end: what the guest has done is then reported.
            let may_stop = matches!(exit, Exit::Signal | Exit::Out(PORT_DOORBELL, _));
            if may_stop && handler.interrupted() {
                return Err(SandboxError::Interrupted);
            }
            if let Some(time) = watchdog.stalled() {
                let regs = self.vcpu.get_regs().map_err(|e| SandboxError::unusable("KVM_GET_REGS", e.errno()))?;
                let place = place(&self.layout.modules, regs.rip);
                return Err(SandboxError::GuestStalled { time, place });
            }
            if let Some(Excess { device, text }) = handler.excess(watchdog.total()).filter(|_| may_stop) {
                return Err(SandboxError::LimitExceeded { device, text });
            }
            if matches!(exit, Exit::Signal) {
                continue;
            }
            self.report.exits += 1;
            match exit {
                Exit::Signal => {}
                Exit::Out(PORT_DOORBELL, count) => {
                    self.doorbell(count, handler)?;
                    // Now, too: a request that was cut short failed, and the guest would report that failure.
                    if handler.interrupted() {
                        return Err(SandboxError::Interrupted);
                    }
                }
                Exit::Out(PORT_MESSAGE, length) => messages.take(&self.ram, &self.layout.modules, length, handler)?,
                Exit::Out(PORT_EXIT, _) => {
                    self.report.messages = messages.count;
                    self.report.time_run = started.elapsed();
                    return Ok(self.report);
                }
                Exit::OutByte(PORT_FAULT, vector) => return Err(self.fault(vector)?),
                Exit::Out(port, _) | Exit::OutByte(port, _) => {
                    return Err(SandboxError::protocol(format!("`out` to unassigned port {port:#x}")));
                }
                Exit::Forbidden(what) => return Err(SandboxError::protocol(what)),
                Exit::Kvm(what, errno) => return Err(SandboxError::unusable(what, errno)),
            }
        }
    }

    /// The privilege level that the vCPU is at.
    fn ring(&self) -> Result<u8, SandboxError> {
        let sregs = self.vcpu.get_sregs().map_err(|e| SandboxError::unusable("KVM_GET_SREGS", e.errno()))?;
        Ok(sregs.cs.selector.to_le_bytes()[0] & 3)
    }

    /// Execute the first `count` requests of the ring. The handler works on a copy: the guest cannot change a
    /// request after it was checked.
    fn doorbell(&mut self, count: u32, handler: &mut dyn Host) -> Result<(), SandboxError> {
        let length = usize::try_from(count).unwrap_or(usize::MAX);
        if length == 0 || length > RING_CAPACITY {
            return Err(SandboxError::protocol(format!(
                "a doorbell for {count} requests, 1 to {RING_CAPACITY} are possible"
            )));
        }
        self.report.doorbells += 1;
        self.report.requests += u64::from(count);
        let mut requests = vec![Request::default(); length];
        if !self.ram.read(RING_ADDR, bytes_mut(&mut requests)) {
            return Err(SandboxError::protocol("a ring outside memory"));
        }
        for request in &mut requests {
            request.status = instar_guest_abi::request_status::NOT_RUN;
        }
        let heap = HeapBuffers { ram: &self.ram, range: &self.layout.heap };
        if let Err(bad) = handler.requests(&heap, &mut requests) {
            // The one that breaks a rule is the first that was not executed.
            let culprit = requests.iter().find(|request| request.status == instar_guest_abi::request_status::NOT_RUN);
            let place = place(&self.layout.modules, culprit.map_or(0, |request| request.caller));
            return Err(SandboxError::protocol(format!("{} (asked for by {place})", printable(&bad.0))));
        }
        if !self.ram.write(RING_ADDR, bytes(&requests)) {
            return Err(SandboxError::protocol("a ring outside memory"));
        }
        Ok(())
    }

    /// The error for a report on the fault port.
    fn fault(&self, vector: u8) -> Result<SandboxError, SandboxError> {
        let failed = |what: &'static str| move |e: kvm_ioctls::Error| SandboxError::unusable(what, e.errno());
        if self.ring()? != 0 || vector >= VECTORS {
            return Ok(SandboxError::protocol("a false report of a fault"));
        }
        let regs = self.vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let sregs = self.vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        Ok(fault::fault(&self.ram, &self.layout.modules, vector, regs.rsp, sregs.cr2))
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
