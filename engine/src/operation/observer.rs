//! Who is told what an operation does while it runs.

/// Is told what an operation does. Text that comes from an image or a guest is not safe for a terminal:
/// [`printable`](crate::escape::printable) makes it so.
pub trait Observer {
    /// Whether [`Observer::note`] is wanted: some notes take reads of their own.
    fn wants_notes(&self) -> bool {
        false
    }

    /// A line for whoever looks for the reason of something: which plugins were loaded, which images were found, how the
    /// process is confined, what the guest logs.
    fn note(&self, line: &str) {
        let _ = line;
    }

    /// A line that names a file, before anything is changed.
    fn warning(&self, line: &str) {
        let _ = line;
    }

    /// Whether [`Observer::progress`] is wanted: only what is durable counts, so that the target is flushed for it now and
    /// then.
    fn wants_progress(&self) -> bool {
        false
    }

    /// Whether somebody asks at this moment how far the operation is. It is asked often, and answered by
    /// [`Observer::progress`], for which nothing is flushed: what moved counts, durable or not.
    fn asks_for_progress(&self) -> bool {
        false
    }

    /// How far the operation is.
    fn progress(&self, progress: Progress) {
        let _ = progress;
    }
}

/// Nobody is told anything.
impl Observer for () {}

/// What an operation that changes images is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It looks: nothing is changed before there is a plan.
    Checking,
    /// It writes what is to be committed.
    Writing,
    /// It reads back what was written.
    Verifying,
    /// It hashes the disk.
    Hashing,
    /// It gives the space of the overlay back.
    Emptying,
    /// It reads what images hold, and changes nothing.
    Reading,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Bytes of this stage that are durable. The whole is reached only when the stage is over.
    pub done: u64,
    /// Bytes of this stage; 0 where that is not known, or where there is nothing to do.
    pub total: u64,
}
