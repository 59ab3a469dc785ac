//! What surrounds an operation: who is told of it, who may end it, and whether the process is confined for it.

use super::observer::Observer;
use crate::cancel::Cancel;
use crate::confine::{printing_on, Confinement, Needs, Reach, Work};
use std::fmt;
use std::os::fd::RawFd;
use std::rc::Rc;

/// What surrounds an operation.
#[derive(Clone)]
pub struct Session {
    observer: Rc<dyn Observer>,
    cancel: Cancel,
    confined: bool,
    prints_on: Option<RawFd>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("confined", &self.confined).finish_non_exhaustive()
    }
}

impl Session {
    /// For a process that works for one operation and ends then: the operation [confines](crate::confine) it, for good. A
    /// panic hook that opens files, as that of the standard library with `RUST_BACKTRACE`, is stopped there.
    #[must_use]
    pub fn confined(observer: Rc<dyn Observer>, cancel: Cancel) -> Self {
        Self { observer, cancel, confined: true, prints_on: None }
    }

    /// For a process that goes on afterwards: it stays as it is. What the plugins read of an image's headers, they read in
    /// this process, with all that it may do; a [`Worker`](crate::worker::Worker) keeps that away from it.
    #[must_use]
    pub fn unconfined(observer: Rc<dyn Observer>, cancel: Cancel) -> Self {
        Self { observer, cancel, confined: false, prints_on: None }
    }

    /// Let the process, once it is confined, also write to this descriptor, and wait for its reader: the observer does.
    #[must_use]
    pub fn printing_on(self, descriptor: RawFd) -> Self {
        Self { prints_on: Some(descriptor), ..self }
    }

    /// What the process has to be allowed besides its work and these needs of its sandbox.
    pub(crate) fn needs(&self, sandbox: Needs) -> Needs {
        match self.prints_on {
            Some(descriptor) => Needs { calls: [sandbox.calls, printing_on(descriptor)].concat(), ..sandbox },
            None => sandbox,
        }
    }

    /// Who is told what happens.
    #[must_use]
    pub fn observer(&self) -> &Rc<dyn Observer> {
        &self.observer
    }

    /// Who may end the operation.
    #[must_use]
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Make a note, if it is wanted.
    pub fn note(&self, line: impl FnOnce() -> String) {
        if self.observer.wants_notes() {
            self.observer.note(&line());
        }
    }

    /// Confine the process to these files, this kind of work and what else it needs, if that is to be.
    pub(crate) fn begin(&self, reach: Reach<'_>, work: Work, needs: &Needs) -> Option<Confinement> {
        self.confined.then(|| Confinement::begin(reach, work, needs))
    }
}
