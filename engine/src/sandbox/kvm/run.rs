//! The main vCPU: it is served, and waits for its workers.

use super::machine::Machine;
use super::step::{position, ring, step};
use super::watchdog::Watchdog;
use super::workers::Workers;
use crate::sandbox::error::SandboxError;
use crate::sandbox::guest_loop::{Exit, Guest, Processor};
use crate::sandbox::host::Host;
use crate::sandbox::program::Report;
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::Arc;
use std::time::Duration;

/// How long the host waits for workers before it looks whether the guest is to be ended.
const TICK: Duration = Duration::from_millis(100);

/// The main vCPU, the guest that it runs, and what gets the thread out of it.
struct Entered<'a> {
    vcpu: &'a mut VcpuFd,
    vm: &'a VmFd,
    workers: &'a mut Workers,
    guest: &'a Arc<Guest>,
    watchdog: Watchdog,
    /// It goes on when all workers are idle.
    joins: bool,
}

impl Machine {
    /// Run it until it exits.
    ///
    /// # Errors
    /// Why it was ended.
    pub fn run(mut self, host: &mut dyn Host) -> Result<Report, SandboxError> {
        let watchdog = Watchdog::new(self.guest.stall_limit())?;
        let Self { vcpu, vm, workers, guest, report } = &mut self;
        let mut entered = Entered { vcpu, vm, workers, guest, watchdog, joins: false };
        guest.run(&mut entered, *report, host)
    }
}

impl Processor for Entered<'_> {
    fn enter(&mut self) -> Result<Exit, SandboxError> {
        if let Some(error) = self.workers.failure() {
            return Ok(Exit::Ended(error));
        }
        if self.joins && !self.workers.wait(TICK) {
            return Ok(Exit::Nothing);
        }
        self.joins = false;
        self.watchdog.enter();
        let exit = step(self.vcpu, self.guest);
        self.watchdog.leave();
        exit
    }

    fn used(&self) -> Duration {
        self.watchdog.used() + self.workers.used()
    }

    fn wake(&mut self, workers: u32) -> Result<(), SandboxError> {
        self.workers.wake(workers, self.vm, self.guest)
    }

    fn join(&mut self) {
        self.workers.call_off();
        self.joins = true;
    }

    fn finish(&mut self) -> Result<(), SandboxError> {
        match self.workers.failure() {
            Some(error) => Err(error),
            None if self.workers.wait(Duration::ZERO) => Ok(()),
            None => Err(SandboxError::protocol("it ended while its workers were at work")),
        }
    }

    fn position(&mut self) -> Result<u64, SandboxError> {
        match self.workers.stop() {
            // It is a worker that the main processor waits for.
            Some(position) if self.joins => Ok(position),
            _ => position(self.vcpu),
        }
    }

    fn ring(&self) -> Result<u8, SandboxError> {
        ring(self.vcpu)
    }
}
