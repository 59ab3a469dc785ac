//! The vCPU: enter the guest, and say why it came out.

use super::machine::Machine;
use super::watchdog::Watchdog;
use super::x86::fault;
use super::x86::system::VECTORS;
use crate::sandbox::error::SandboxError;
use crate::sandbox::guest_loop::{Exit, Guest, Processor};
use crate::sandbox::host::Host;
use crate::sandbox::program::Report;
use instar_guest_abi::PORT_FAULT;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::time::Duration;

/// A vCPU, the guest that it runs, and what gets the thread out of it.
struct Entered<'a> {
    vcpu: &'a mut VcpuFd,
    guest: &'a Guest,
    watchdog: Watchdog,
}

impl Machine {
    /// Run it until it exits.
    ///
    /// # Errors
    /// Why it was ended.
    pub fn run(mut self, host: &mut dyn Host) -> Result<Report, SandboxError> {
        let watchdog = Watchdog::new(self.guest.stall_limit())?;
        let mut entered = Entered { vcpu: &mut self.vcpu, guest: &self.guest, watchdog };
        self.guest.run(&mut entered, self.report, host)
    }
}

impl Processor for Entered<'_> {
    fn enter(&mut self) -> Result<Exit, SandboxError> {
        self.watchdog.enter();
        let exit = self.step();
        self.watchdog.leave();
        exit
    }

    fn used(&self) -> Duration {
        self.watchdog.used()
    }

    fn position(&mut self) -> Result<u64, SandboxError> {
        Ok(self.vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?.rip)
    }

    fn ring(&self) -> Result<u8, SandboxError> {
        let sregs = self.vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        Ok(sregs.cs.selector.to_le_bytes()[0] & 3)
    }
}

impl Entered<'_> {
    fn step(&mut self) -> Result<Exit, SandboxError> {
        let forbidden = |what: String| Ok(Exit::Ended(SandboxError::protocol(what)));
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(PORT_FAULT, &[vector])) => Ok(Exit::Ended(self.fault(vector)?)),
            Ok(VcpuExit::IoOut(port, &[a, b, c, d])) => Ok(Exit::Out(port, u32::from_le_bytes([a, b, c, d]))),
            Ok(VcpuExit::IoOut(port, &[_])) => forbidden(format!("`out` to unassigned port {port:#x}")),
            Ok(VcpuExit::IoOut(port, data)) => forbidden(format!("`out` of {} bytes to port {port:#x}", data.len())),
            Ok(VcpuExit::IoIn(port, _)) => forbidden(format!("`in` from port {port:#x}")),
            Ok(VcpuExit::MmioRead(address, _)) => {
                forbidden(format!("a read of address {address:#x}, which is no memory"))
            }
            Ok(VcpuExit::MmioWrite(address, _)) => {
                forbidden(format!("a write to address {address:#x}, which is no memory"))
            }
            Ok(VcpuExit::Shutdown) => forbidden("a triple fault".to_owned()),
            Ok(VcpuExit::Hlt) => forbidden("a halt".to_owned()),
            Ok(VcpuExit::Intr) => Ok(Exit::Nothing),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Err(SandboxError::unusable(format!("entering the guest (reason {reason:#x})"), 0))
            }
            Ok(VcpuExit::InternalError) => Err(SandboxError::unusable("KVM_RUN (internal error)", 0)),
            Ok(other) => forbidden(format!("an exit that is not expected: {other:?}")),
            Err(error) if error.errno() == libc::EINTR => Ok(Exit::Nothing),
            // EAGAIN, too: KVM starts a thread of the kernel's with the first run, which a limit of processes refuses.
            Err(error) => Err(SandboxError::unusable("KVM_RUN", error.errno())),
        }
    }

    /// The error for a report on the fault port.
    fn fault(&self, vector: u8) -> Result<SandboxError, SandboxError> {
        if self.ring()? != 0 || vector >= VECTORS {
            return Ok(SandboxError::protocol("a false report of a fault"));
        }
        let regs = self.vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let sregs = self.vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        Ok(fault::fault(&self.guest.ram, self.guest.modules(), vector, regs.rsp, sregs.cr2))
    }
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> SandboxError {
    move |error| SandboxError::unusable(what, error.errno())
}
