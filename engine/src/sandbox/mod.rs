//! Where the modules of an operation run: with nothing but the images' bytes, through a host that checks every request.
//!
//! A [`Sandbox`] is acquired before the process confines itself, and runs one [`Program`] later. [`kvm`] is a virtual machine;
//! [`process`] is for machines that have none.

mod choice;
mod error;
pub(crate) mod fuzzing;
mod guest_loop;
mod host;
pub mod kvm;
mod layout;
mod log;
mod memory;
mod messages;
mod module;
mod placed;
mod plain;
pub mod process;
mod program;
mod rights;
mod x86;

pub use choice::SandboxChoice;
pub use error::SandboxError;
pub use host::{BadRequest, BufferAccess, Excess, Host};
pub use kvm::Kvm;
pub use log::GuestLog;
pub use process::Process;
pub(crate) use program::guest_module;
pub use program::{ModuleSpec, Program, Report, FIRST_FORMAT};
#[cfg(test)]
pub use vm_memory::VolatileSlice;

use crate::confine::Needs;

/// A way to run programs of guest modules.
pub trait Sandbox {
    /// Its name, as an operator writes it.
    fn name(&self) -> &'static str;

    /// Get what a confined process cannot get any more.
    ///
    /// # Errors
    /// Why programs cannot run here.
    fn acquire(&self) -> Result<Box<dyn Ready>, SandboxError>;
}

/// A sandbox that was acquired.
pub trait Ready {
    /// The name of the sandbox that it is, as an operator writes it.
    fn name(&self) -> &'static str;

    /// What the process has to be allowed until the program has run.
    fn needs(&self) -> Needs;

    /// Run a program until it exits.
    ///
    /// # Errors
    /// Why it could not run, or was ended.
    fn run(self: Box<Self>, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError>;
}

/// Run a program in a sandbox.
///
/// # Errors
/// Why there is none, or why the program was ended.
pub fn run(sandbox: &dyn Sandbox, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError> {
    sandbox.acquire()?.run(program, host)
}
