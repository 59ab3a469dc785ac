//! The KVM runner: one virtual machine, one vCPU at ring 3, the modules of one operation.
//!
//! [`run`] stands the machine up, serves it until it exits, and tears it down. The guest can do two things: have a
//! [`GuestHandler`] execute block requests, and send messages; both are bounded and checked, and
//! everything else ends it with a [`VmError`].

mod elf;
mod error;
mod fault;
pub(crate) mod fuzzing;
mod handler;
mod layout;
mod log;
mod machine;
mod memory;
mod message;
mod pages;
mod plain;
mod run;
mod spec;
mod system;
mod vcpu;
mod watchdog;

pub use error::VmError;
pub use handler::{BadRequest, BufferAccess, Excess, GuestHandler};
pub use log::GuestLog;
pub use machine::{KvmDevice, Vm};
pub use spec::{ModuleSpec, VmReport, VmSpec, CHECK, FIRST_FORMAT, MAP};
#[cfg(test)]
pub use vm_memory::VolatileSlice;

/// Run the guest that `spec` describes until it exits.
///
/// # Errors
/// Why there is no guest, or why it was ended.
pub fn run(spec: &VmSpec<'_>, handler: &mut dyn GuestHandler) -> Result<VmReport, VmError> {
    run_on(&KvmDevice::open()?, spec, handler)
}

/// The same on a device that is open.
///
/// # Errors
/// As [`run`].
pub fn run_on(kvm: &KvmDevice, spec: &VmSpec<'_>, handler: &mut dyn GuestHandler) -> Result<VmReport, VmError> {
    Vm::new(kvm, spec)?.run(handler)
}
