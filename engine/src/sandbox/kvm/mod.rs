//! The KVM runner: one virtual machine, its vCPUs at ring 3, the modules of one operation. All but the main vCPU are workers.
//!
//! The machine is stood up, served until it exits, and torn down. The guest can do two things: have a [`Host`] execute block
//! requests, and send messages; both are bounded and checked, and everything else ends it with a [`SandboxError`].

mod calls;
mod machine;
mod run;
mod step;
mod watchdog;
mod workers;
mod x86;

pub use machine::{KvmDevice, Machine};

use super::error::SandboxError;
use super::host::Host;
use super::program::{Program, Report};
use super::{Ready, Sandbox};
use crate::confine::Needs;

/// Its name, as an operator writes it.
const NAME: &str = "kvm";

/// Virtual machines of `/dev/kvm`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kvm;

impl Sandbox for Kvm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn acquire(&self, workers: usize) -> Result<Box<dyn Ready>, SandboxError> {
        Ok(Box::new(KvmDevice::open(workers)?))
    }
}

impl Ready for KvmDevice {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs { calls: calls::calls(self.has_workers()), signals: false }
    }

    fn run(self: Box<Self>, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError> {
        Machine::new(*self, program)?.run(host)
    }
}
