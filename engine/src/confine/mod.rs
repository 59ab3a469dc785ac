//! Confinement of this process: what it can no longer do once it looks at an image that somebody else made.
//!
//! Two layers, each of which can only become stricter:
//!
//! * [`paths`]: Landlock decides which files can be opened, by where they are;
//! * [`calls`] and `filter`: seccomp decides which system calls there are. Any other one ends the process, which [names
//!   it](trap).
//!
//! [`descriptors`] sees to it that the process holds nothing of its caller's but standard output and standard error.
//!
//! A commit takes two steps. [`Confinement::begin`], before the first byte of an image is read: only the images can be
//! opened, nothing can be created, renamed, removed (but for the [name](Reach::add_names) of a new image, and that of one that
//! is [removed](Reach::add_removal)) or executed, and there is no network. [`Confinement::forbid_opening`], once the chain is
//! open: no file at all, only descriptors. What is needed from elsewhere, plugins and `/dev/kvm`, is opened
//! before. A kernel without one of the layers does not stop the program: [`Confinement`] says what is in force.
//!
//! Landlock holds for the calling thread and those that it starts, seccomp for all: nothing starts a thread before.

mod call_names;
pub mod calls;
pub mod descriptors;
mod filter;
pub mod paths;
mod signal_mask;
mod signals_blocked;
pub mod trap;

pub use call_names::call_name;
pub(crate) use calls::printing_on;
pub use calls::{Allowed, Call, Work};
pub use paths::Reach;
pub(crate) use signals_blocked::SignalsBlocked;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

/// What a process has to be allowed besides its work.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// System calls.
    pub calls: Vec<Call>,
    /// Signals to a process that it has started; which ones, the system calls say.
    pub signals: bool,
}

impl Needs {
    /// These needs, and removing names of files from this directory, durably; below it, Landlock lets names be removed as well.
    pub(crate) fn and_removing_in(mut self, directory: &impl AsFd) -> Self {
        self.calls.extend(calls::removing_in(directory.as_fd().as_raw_fd()));
        self
    }
}

/// What is in force, or why it is not: one clause each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    paths: Result<String, String>,
    calls: Result<usize, String>,
    /// What the list of calls is for.
    work: Work,
}

impl Confinement {
    /// Confine the process to these files, and to the system calls of this kind of work, and of what else it needs.
    #[must_use]
    pub fn begin(reach: Reach<'_>, work: Work, needs: &Needs) -> Self {
        // The library of system calls asks for the auxiliary vector once, with calls that are not allowed later.
        let _ = rustix::param::page_size();
        // In this order: a filter may not know the calls that set up Landlock.
        let paths = paths::restrict(&reach.with_signals(needs.signals));
        let calls = filter::apply(work, &needs.calls, filter::Threads::All);
        Self { paths, calls, work }
    }

    /// Confine it further: no file can be opened any more. `reach` is what stays allowed besides.
    #[must_use]
    pub fn forbid_opening(self, reach: Reach<'_>, work: Work, needs: &Needs) -> Self {
        let paths = paths::restrict(&reach.with_signals(needs.signals));
        let calls = self.calls.and_then(|_| filter::narrow(self.work, work, &needs.calls));
        Self { paths: self.paths.and(paths), calls, work }
    }

    /// What would be in force: tried in a thread of its own.
    ///
    /// # Panics
    /// When the thread does.
    #[must_use]
    pub fn trial() -> Self {
        let confined = || Self {
            paths: paths::restrict(&Reach::default()),
            calls: filter::apply(Work::LookInThread, &[], filter::Threads::This),
            work: Work::LookInThread,
        };
        let nothing = |why: &std::io::Error| {
            let why = format!("no thread can be started to try it: {why}");
            Self { paths: Err(why.clone()), calls: Err(why), work: Work::LookInThread }
        };
        std::thread::scope(|scope| match std::thread::Builder::new().spawn_scoped(scope, confined) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(error) => nothing(&error),
        })
    }

    #[cfg(test)]
    pub(crate) fn of(paths: Result<String, String>, calls: Result<usize, String>) -> Self {
        Self { paths, calls, work: Work::Look }
    }

    /// What of Landlock is in force.
    ///
    /// # Errors
    /// Why nothing is: one clause.
    pub fn paths(&self) -> Result<&str, &str> {
        self.paths.as_deref().map_err(String::as_str)
    }

    /// The number of system calls that the filter allows.
    ///
    /// # Errors
    /// Why there is no filter: one clause.
    pub fn calls(&self) -> Result<usize, &str> {
        self.calls.as_ref().copied().map_err(String::as_str)
    }

    /// Run `look` in a thread that can open no file, and return its answer. Weaker than confining the process, whose memory
    /// the thread shares: for a program that has to write a new file afterwards. Where no thread can be started, as in some
    /// containers, the calling one looks.
    ///
    /// # Panics
    /// When `look` does.
    pub fn in_confined_thread<T: Send>(look: impl Fn() -> T + Send + Sync) -> T {
        let confined = || {
            settle_memory();
            // Best effort, as for a process.
            let _ = paths::restrict(&Reach::default());
            let _ = filter::apply(Work::LookInThread, &[], filter::Threads::This);
            look()
        };
        std::thread::scope(|scope| match std::thread::Builder::new().spawn_scoped(scope, confined) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(_) => look(),
        })
    }
}

/// Have the C library give memory of this thread back once. The first time, glibc reads a file to find out how
/// (`/proc/sys/vm/overcommit_memory`, in `check_may_shrink_heap`), which a thread that looks at an image cannot do any more.
fn settle_memory() {
    // More than what it keeps (128 KiB), in pieces that it does not map one by one.
    let pieces: Vec<Vec<u8>> = (0..8).map(|_| vec![1; 64 << 10]).collect();
    drop(std::hint::black_box(pieces));
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.paths {
            Ok(what) => write!(f, "{what}; ")?,
            Err(why) => write!(f, "Landlock is not in force ({why}); ")?,
        }
        match &self.calls {
            Ok(count) => write!(f, "seccomp: {count} system calls"),
            Err(why) => write!(f, "seccomp is not in force ({why})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let both = Confinement::of(Ok("Landlock ABI 1: paths".into()), Ok(40));
        assert_eq!(both.to_string(), "Landlock ABI 1: paths; seccomp: 40 system calls");
        let none = Confinement::of(Err("this".into()), Err("that".into()));
        assert_eq!(none.to_string(), "Landlock is not in force (this); seccomp is not in force (that)");
    }
}
