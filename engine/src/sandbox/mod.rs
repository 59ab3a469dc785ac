//! Where the modules of an operation run: with nothing but the images' bytes, through a host that checks every request.
//!
//! A [`Sandbox`] is acquired before the process confines itself, and runs one [`Program`] later. [`kvm`] is the one there is.

mod error;
pub(crate) mod fuzzing;
mod host;
pub mod kvm;
mod log;
mod memory;
mod messages;
mod module;
mod placed;
mod plain;
mod program;
mod rights;

pub use error::SandboxError;
pub use host::{BadRequest, BufferAccess, Excess, Host};
pub use kvm::Kvm;
pub use log::GuestLog;
pub(crate) use program::guest_module;
pub use program::{ModuleSpec, Program, Report, FIRST_FORMAT};
#[cfg(test)]
pub use vm_memory::VolatileSlice;

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
