//! How a vCPU enters the guest, and why it comes out.

use super::x86::fault;
use super::x86::system::VECTORS;
use crate::sandbox::error::SandboxError;
use crate::sandbox::guest_loop::{Exit, Guest};
use instar_guest_abi::PORT_FAULT;
use kvm_ioctls::{VcpuExit, VcpuFd};

/// The instruction that a vCPU is at.
///
/// # Errors
/// [`SandboxError::KvmUnusable`].
pub fn position(vcpu: &VcpuFd) -> Result<u64, SandboxError> {
    Ok(vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?.rip)
}

/// The privilege level of the guest's code.
///
/// # Errors
/// [`SandboxError::KvmUnusable`].
pub fn ring(vcpu: &VcpuFd) -> Result<u8, SandboxError> {
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    Ok(sregs.cs.selector.to_le_bytes()[0] & 3)
}

/// Enter the guest on this thread, and say why it came out.
///
/// # Errors
/// [`SandboxError::KvmUnusable`].
pub fn step(vcpu: &mut VcpuFd, guest: &Guest) -> Result<Exit, SandboxError> {
    let forbidden = |what: String| Ok(Exit::Ended(SandboxError::protocol(what)));
    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT_FAULT, &[vector])) => Ok(Exit::Ended(fault(vcpu, guest, vector)?)),
        Ok(VcpuExit::IoOut(port, &[a, b, c, d])) => Ok(Exit::Out(port, u32::from_le_bytes([a, b, c, d]))),
        Ok(VcpuExit::IoOut(port, &[_])) => forbidden(format!("`out` to unassigned port {port:#x}")),
        Ok(VcpuExit::IoOut(port, data)) => forbidden(format!("`out` of {} bytes to port {port:#x}", data.len())),
        Ok(VcpuExit::IoIn(port, _)) => forbidden(format!("`in` from port {port:#x}")),
        Ok(VcpuExit::MmioRead(address, _)) => forbidden(format!("a read of address {address:#x}, which is no memory")),
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
fn fault(vcpu: &VcpuFd, guest: &Guest, vector: u8) -> Result<SandboxError, SandboxError> {
    if ring(vcpu)? != 0 || vector >= VECTORS {
        return Ok(SandboxError::protocol("a false report of a fault"));
    }
    let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    Ok(fault::fault(&guest.ram, guest.modules(), vector, regs.rsp, sregs.cr2))
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> SandboxError {
    move |error| SandboxError::unusable(what, error.errno())
}
