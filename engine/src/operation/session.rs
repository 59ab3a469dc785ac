//! The surroundings of an operation: its observer, the handle that ends it, and whether it confines the process.

use super::observer::Observer;
use crate::cancel::Cancel;
use crate::confine::{printing_on, Confinement, Needs, Reach, Work};
use std::fmt;
use std::os::fd::RawFd;
use std::rc::Rc;

/// The surroundings of an operation.
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
    /// Make a session for a process that ends after one operation, which [confines](crate::confine) it for good. A panic hook
    /// that opens files, such as that of the standard library with `RUST_BACKTRACE`, is stopped there.
    #[must_use]
    pub fn confined(observer: Rc<dyn Observer>, cancel: Cancel) -> Self {
        Self { observer, cancel, confined: true, prints_on: None }
    }

    /// Make a session for a process that continues afterwards and is not confined. The plugins read the headers of images in
    /// this process, with all its rights; a [`Worker`](crate::worker::Worker) avoids that.
    #[must_use]
    pub fn unconfined(observer: Rc<dyn Observer>, cancel: Cancel) -> Self {
        Self { observer, cancel, confined: false, prints_on: None }
    }

    /// Let the confined process write to this descriptor as well, and wait for its reader, on behalf of the observer.
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

    /// Return the observer.
    #[must_use]
    pub fn observer(&self) -> &Rc<dyn Observer> {
        &self.observer
    }

    /// Return the handle that ends the operation.
    #[must_use]
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Send a note to the observer, if it wants notes.
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
