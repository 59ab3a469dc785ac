//! The sandboxes in which the modules of an operation run. A module reaches only the bytes of the images, through a host that
//! checks every request.
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
mod processors;
mod program;
mod rights;
mod x86;

pub use choice::SandboxChoice;
pub use error::SandboxError;
pub use host::{BadRequest, BufferAccess, Excess, Host};
pub use kvm::Kvm;
pub use log::GuestLog;
pub use process::Process;
pub use processors::workers;
pub(crate) use program::guest_module;
pub use program::{ModuleSpec, Program, Report, FIRST_FORMAT};
#[cfg(test)]
pub use vm_memory::VolatileSlice;

use crate::confine::Needs;

/// A way to run programs of guest modules.
///
/// # Example
///
/// Use the process where there is no KVM, and say so:
///
/// ```
/// use instar::sandbox::{Kvm, Process, Ready, Sandbox, SandboxError};
///
/// struct Fallback;
///
/// impl Sandbox for Fallback {
///     fn name(&self) -> &'static str {
///         "fallback"
///     }
///
///     fn acquire(&self, workers: usize) -> Result<Box<dyn Ready>, SandboxError> {
///         Kvm.acquire(workers).or_else(|error| {
///             eprintln!("{error}");
///             Process.acquire(workers)
///         })
///     }
/// }
/// ```
pub trait Sandbox {
    /// Its name, as an operator writes it.
    fn name(&self) -> &'static str;

    /// Acquire everything that a confined process cannot acquire any more, with `workers` processors for the guest besides its main
    /// one, [`MAX_WORKERS`](instar_guest_abi::MAX_WORKERS) at most. It may turn out to have fewer.
    ///
    /// # Errors
    /// The reason why programs cannot run here.
    fn acquire(&self, workers: usize) -> Result<Box<dyn Ready>, SandboxError>;
}

/// A sandbox that holds everything it needs, such as the open `/dev/kvm`, so that the process may confine itself before the
/// program runs.
///
/// # Example
///
/// Print how long each program ran:
///
/// ```
/// use instar::confine::Needs;
/// use instar::sandbox::{Host, Program, Ready, Report, SandboxError};
/// use std::time::Instant;
///
/// struct Timed(Box<dyn Ready>);
///
/// impl Ready for Timed {
///     fn name(&self) -> &'static str {
///         self.0.name()
///     }
///
///     fn needs(&self) -> Needs {
///         self.0.needs()
///     }
///
///     fn run(self: Box<Self>, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError> {
///         let begun = Instant::now();
///         let report = self.0.run(program, host);
///         println!("{:?}", begun.elapsed());
///         report
///     }
/// }
/// ```
pub trait Ready {
    /// The name of the sandbox that it is, as an operator writes it.
    fn name(&self) -> &'static str;

    /// Return the rights that the process needs until the program has run.
    fn needs(&self) -> Needs;

    /// Run a program until it exits.
    ///
    /// # Errors
    /// The reason why it could not run, or was ended.
    fn run(self: Box<Self>, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError>;
}

/// Run a program in a sandbox, on one processor.
///
/// # Errors
/// The reason why the sandbox cannot be used, or why the program was ended.
pub fn run(sandbox: &dyn Sandbox, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError> {
    sandbox.acquire(0)?.run(program, host)
}
