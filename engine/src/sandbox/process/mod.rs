//! The process sandbox, for machines without KVM: the same modules in a process that can do nothing but ring its host.
//!
//! A [static program](instar_guest_starter) without a C library is started in an address space of its own before this process
//! confines itself. It holds the guest's memory, which both processes map, and a socket, the doorbell; it gives up everything
//! else and jumps into the guest. From then on its system calls are a `write` of 8 bytes to the doorbell, which is what an `out`
//! is in a virtual machine, a `read` of one byte from it, and the end. What the guest rings for is checked and executed by the
//! same loop as a virtual machine's.
//!
//! Each further processor is another such process, with the same memory and text and a doorbell of its own: a worker.
//!
//! Unlike a vCPU, the guest may go on running while it is served, if it does not wait for the answer. Its memory may change at
//! any moment: everything that is checked is copied first.

mod calls;
mod child;
mod memory_files;
mod run;
mod spawn;
mod turns;
mod workers;

use super::error::SandboxError;
use super::host::Host;
use super::layout;
use super::program::{guest_module, ModuleSpec, Program, Report};
use super::{Ready, Sandbox};
use crate::confine::Needs;
use child::Guests;

/// Its name, as an operator writes it.
const NAME: &str = "process";

const CORE: ModuleSpec<'static> = guest_module!("process");
const STARTER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/starter-module.elf"));

/// Processes that can do nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process;

impl Sandbox for Process {
    fn name(&self) -> &'static str {
        NAME
    }

    fn acquire(&self, workers: usize) -> Result<Box<dyn Ready>, SandboxError> {
        Ok(Box::new(Guests::start(STARTER, workers)?))
    }
}

impl Ready for Guests {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs { calls: calls::calls(self), signals: true }
    }

    fn run(self: Box<Self>, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError> {
        run::run(*self, program, host)
    }
}

fn unusable(what: impl Into<String>, errno: i32) -> SandboxError {
    SandboxError::ProcessUnusable { what: what.into(), errno }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::STARTER;
    use crate::sandbox::module::{load, Loaded};

    #[test]
    fn the_starter_needs_no_relocation_and_has_nothing_to_write() {
        // Nobody relocates it: it is the same wherever it lies.
        let (here, there) = (load(STARTER, 0x1000).unwrap(), load(STARTER, 0x7fff_0000_0000).unwrap());
        let bytes =
            |loaded: &Loaded<'_>| loaded.segments.iter().map(|segment| segment.bytes.to_vec()).collect::<Vec<_>>();
        assert!(bytes(&here) == bytes(&there), "a relocation");
        assert!(here.segments.iter().all(|segment| !segment.rights.write), "{:?}", here.segments);
        assert!(here.segments.iter().any(|segment| segment.rights.execute));
        assert!(STARTER.len() < 64 << 10, "{} bytes", STARTER.len());
    }
}
