//! Observing an operation while it runs.

/// An observer of an operation. Text from an image or a guest is not safe for a terminal until
/// [`printable`](crate::escape::printable) has escaped it.
///
/// # Example
///
/// ```
/// use instar::escape::printable;
/// use instar::operation::Observer;
///
/// struct Warnings;
///
/// impl Observer for Warnings {
///     fn warning(&self, line: &str) {
///         eprintln!("warning: {}", printable(line));
///     }
/// }
/// ```
pub trait Observer {
    /// Whether to call [`Observer::note`]: some notes need additional reads.
    fn wants_notes(&self) -> bool {
        false
    }

    /// Take a line for troubleshooting: loaded plugins, images that were found, the confinement of the process, and the guest's
    /// log.
    fn note(&self, line: &str) {
        let _ = line;
    }

    /// Take a warning that names a file, before anything changes.
    fn warning(&self, line: &str) {
        let _ = line;
    }

    /// Whether the operation may begin to change an image, into which it would write this many bytes of the disk. Everything that
    /// can refuse it has been asked. Only a rebase asks: one of several then waits until the others can begin, too.
    fn agrees(&self, bytes: u64) -> bool {
        let _ = bytes;
        true
    }

    /// Whether to call [`Observer::progress`]: only durable bytes count, so this flushes the target now and then.
    fn wants_progress(&self) -> bool {
        false
    }

    /// Whether somebody asks for the progress at this moment. The operation calls this often, and answers with
    /// [`Observer::progress`] without a flush: all moved bytes count, durable or not.
    fn asks_for_progress(&self) -> bool {
        false
    }

    /// Take the progress of the operation.
    fn progress(&self, progress: Progress) {
        let _ = progress;
    }
}

/// Ignores everything.
impl Observer for () {}

/// A stage of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Examining the images: nothing changes before the plan is complete.
    Checking,
    /// Writing into the target.
    Writing,
    /// Reading back the written data.
    Verifying,
    /// Hashing the disk.
    Hashing,
    /// Giving back the space of the overlay.
    Emptying,
    /// Reading images without changing them.
    Reading,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The present stage.
    pub stage: Stage,
    /// Durable bytes of this stage. Equals the total only when the stage is over.
    pub done: u64,
    /// Total bytes of this stage; 0 if that is unknown, or if there is nothing to do.
    pub total: u64,
}
