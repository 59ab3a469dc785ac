//! What surrounds an operation: who is told of it, who may end it, and whether the process is confined for it.

use super::observer::Observer;
use crate::cancel::Cancel;
use crate::confine::{Confinement, Reach, Work};
use crate::sandbox::{Kvm, Sandbox};
use std::fmt;
use std::rc::Rc;

/// What surrounds an operation.
#[derive(Clone)]
pub struct Session {
    observer: Rc<dyn Observer>,
    cancel: Cancel,
    confined: bool,
    sandbox: Rc<dyn Sandbox>,
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
        Self { observer, cancel, confined: true, sandbox: Rc::new(Kvm) }
    }

    /// For a process that goes on afterwards: it stays as it is. What the plugins read of an image's headers, they read in
    /// this process, with all that it may do; a [`Worker`](crate::worker::Worker) keeps that away from it.
    #[must_use]
    pub fn unconfined(observer: Rc<dyn Observer>, cancel: Cancel) -> Self {
        Self { observer, cancel, confined: false, sandbox: Rc::new(Kvm) }
    }

    /// The same, in another sandbox than [`Kvm`].
    #[must_use]
    pub fn in_sandbox(self, sandbox: Rc<dyn Sandbox>) -> Self {
        Self { sandbox, ..self }
    }

    /// Where the guest runs.
    #[must_use]
    pub fn sandbox(&self) -> &dyn Sandbox {
        &*self.sandbox
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

    /// Confine the process to these files and this kind of work, if that is to be.
    pub(crate) fn begin(&self, reach: &Reach<'_>, work: Work) -> Option<Confinement> {
        self.confined.then(|| Confinement::begin(reach, work))
    }
}
