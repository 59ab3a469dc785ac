//! The guest's processors besides the main one: each is a process of its own, which the starter leaves only when it is woken for
//! the first time.

use super::child::Child;
use crate::sandbox::error::SandboxError;
use instar_guest_abi::PORT_IDLE;
use instar_guest_starter::{Ring, Step};
use std::time::Duration;

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The starter may not be ready yet.
    Starting,
    /// The starter has been told to go on. It says twice that it is done: when it waits, which it may have done long ago, ...
    Entering,
    /// ... and when it jumps into the guest.
    Mapping,
    /// It sleeps.
    Idle,
    /// It is in the guest.
    Running,
}

struct Worker<'a> {
    child: &'a mut Child,
    state: State,
}

/// What a worker wants that does something else than to become idle.
pub enum Wants {
    /// It rang.
    Ring(Ring),
    /// It could not be started.
    Start(Ring),
}

/// The workers of a guest.
pub struct Workers<'a>(Vec<Worker<'a>>);

impl<'a> Workers<'a> {
    /// Those that were started.
    pub fn new(children: &'a mut [Child]) -> Self {
        Self(children.iter_mut().map(|child| Worker { child, state: State::Starting }).collect())
    }

    /// Let the first `count` of them go on.
    ///
    /// # Errors
    /// [`SandboxError::GuestProtocol`] if there are not so many, or one is at work.
    pub fn wake(&mut self, count: u32) -> Result<(), SandboxError> {
        let there = self.0.len();
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count == 0 || count > there {
            return Err(SandboxError::protocol(format!("waking {count} workers, and there are {there}")));
        }
        if self.0.iter().any(Worker::is_busy) {
            return Err(SandboxError::protocol("waking workers while they are at work"));
        }
        for (number, worker) in (1..).zip(&mut self.0).take(count) {
            // The starter hears which processor it becomes; the guest hears nothing.
            let starts = worker.state == State::Starting;
            worker.child.answer(if starts { number } else { 0 })?;
            worker.state = if starts { State::Entering } else { State::Running };
        }
        Ok(())
    }

    /// Whether one is at work.
    pub fn are_busy(&self) -> bool {
        self.0.iter().any(Worker::is_busy)
    }

    /// Look at what they want; with `wait`, until the first that is at work wants something, for a tick at most.
    ///
    /// # Errors
    /// One of them is gone.
    pub fn look(&mut self, wait: bool) -> Result<Option<Wants>, SandboxError> {
        let mut wait = wait;
        for worker in self.0.iter_mut().filter(|worker| worker.is_busy()) {
            while worker.is_busy() {
                let Some(ring) = (if wait { worker.child.wait() } else { worker.child.poll() })? else {
                    wait = false;
                    break;
                };
                if let Some(wants) = worker.rang(ring) {
                    return Ok(Some(wants));
                }
            }
        }
        Ok(None)
    }

    /// The processor time that they have used.
    pub fn used(&self) -> Duration {
        self.0.iter().filter(|worker| worker.state != State::Starting).filter_map(|worker| worker.child.used()).sum()
    }

    /// One that is at work.
    pub fn busy(&mut self) -> Option<&mut Child> {
        self.0.iter_mut().find(|worker| worker.is_busy()).map(|worker| &mut *worker.child)
    }
}

impl Worker<'_> {
    fn is_busy(&self) -> bool {
        matches!(self.state, State::Entering | State::Mapping | State::Running)
    }

    /// It rang: what it wants, if that is not what is expected of it.
    fn rang(&mut self, ring: Ring) -> Option<Wants> {
        // The socket keeps the order: nothing of the guest comes before the starter's last word.
        match (self.state, ring.port) {
            (State::Entering, port) if port == Step::Done as u32 => self.state = State::Mapping,
            (State::Mapping, port) if port == Step::Done as u32 => self.state = State::Running,
            (State::Entering | State::Mapping, port) if Step::from_u32(port).is_some() => {
                return Some(Wants::Start(ring))
            }
            (State::Running, port) if port == u32::from(PORT_IDLE) => self.state = State::Idle,
            _ => return Some(Wants::Ring(ring)),
        }
        None
    }
}
