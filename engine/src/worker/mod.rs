//! Operations in a separate process, for programs that continue afterwards. That process is confined, and an image that takes
//! over the library reaches nothing else.
//!
//! ```no_run
//! use instar::commit::CommitRequest;
//! use instar::operation::{Cancel, Observer, Progress, Settings};
//! use instar::plugins::SearchPath;
//! use instar::worker::Worker;
//!
//! struct Bar;
//!
//! impl Observer for Bar {
//!     fn warning(&self, line: &str) {
//!         eprintln!("{}", instar::escape::printable(line));
//!     }
//!
//!     fn wants_progress(&self) -> bool {
//!         true
//!     }
//!
//!     fn progress(&self, progress: Progress) {
//!         eprintln!("{:?}: {} of {} bytes", progress.stage, progress.done, progress.total);
//!     }
//! }
//!
//! # fn main() -> Result<(), instar::error::Error> {
//! let settings = Settings { search: SearchPath::for_process(&[], &[]), ..Settings::default() };
//! let request = CommitRequest { overlay: "overlay.qcow2".into(), settings, ..CommitRequest::default() };
//! // Any thread with a clone of it can end the commit, at a point where both images are consistent.
//! let cancel = Cancel::new();
//! let outcome = Worker::new("/usr/bin/instar").commit(&request, &Bar, &cancel)?;
//! println!("{} bytes are in {}", outcome.bytes_committed, outcome.backing.display());
//! # Ok(())
//! # }
//! ```

mod serve;
mod wire;

pub use serve::serve;
pub use wire::{decode_error, encode_error};

use crate::cancel::Cancel;
use crate::commit::{CommitOutcome, CommitRequest};
use crate::error::Error;
use crate::operation::Observer;
use instar_guest_abi::ErrorCode;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{kill_process, Pid, Signal};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use wire::{Answer, Frames};

/// The command of the program, and the name of the file that it reads the request from.
pub const COMMAND: [&str; 2] = ["worker", "/dev/stdin"];

/// How long it may take until a worker is told that its operation is cancelled.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// Bytes of a worker's standard error that are kept for the message about its end.
const SAID_MAX: usize = 4096;

/// The `instar` program as a worker. It gets its order and sends its reports as messages, and gets nothing else from the
/// caller.
#[derive(Clone, Debug)]
pub struct Worker {
    program: PathBuf,
}

/// Ends a worker whose caller panics.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.stop();
            let _ = self.0.wait();
        }
    }
}

impl Running {
    /// Ask it to end at a safe point.
    fn stop(&self) {
        if let Some(process) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(process, Signal::TERM);
        }
    }
}

impl Worker {
    /// Use the program at this path, which must have the version of the library.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Commit an overlay. Calls `observer` in this thread; `cancel` ends the commit.
    ///
    /// # Errors
    /// As [`run_commit`](crate::commit::run_commit); when there is no worker, or it ends without an answer.
    pub fn commit(
        &self,
        request: &CommitRequest,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<CommitOutcome, Error> {
        let message = wire::request(request, observer);
        let failed = |what, error: &std::io::Error| Error::io(&self.program, ErrorCode::OpenFailed, what, error);
        let command = Command::new(&self.program)
            .args(COMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut worker = Running(command.map_err(|error| failed("cannot be started as a worker", &error))?);
        if let Some(mut input) = worker.0.stdin.take() {
            // One that is not there any more says why itself.
            let _ = input.write_all(&message);
        }
        let (output, errors) = (worker.0.stdout.take(), worker.0.stderr.take());
        let (answer, said) = listen(&worker, output, errors, observer, cancel)
            .map_err(|error| failed("cannot be listened to", &error))?;
        let status = worker.0.wait().map_err(|error| failed("cannot be waited for", &error))?;
        match answer {
            Some(Answer::Outcome(outcome)) => Ok(*outcome),
            Some(Answer::Error(error)) => Err(error),
            None => Err(self.silent(&format!("{status}"), &said)),
        }
    }

    /// The worker has ended without an answer.
    fn silent(&self, status: &str, said: &[u8]) -> Error {
        let said = String::from_utf8_lossy(said);
        let said = said.lines().next().map(|line| format!(", saying: {line}")).unwrap_or_default();
        let clause = format!("the worker ended without an answer ({status}){said}");
        Error::image(Path::new(&self.program), ErrorCode::InternalOverflow, clause)
    }
}

/// Take what a worker says until it says no more: its answer, and the first of what it said on standard error.
fn listen(
    worker: &Running,
    output: Option<ChildStdout>,
    errors: Option<ChildStderr>,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> std::io::Result<(Option<Answer>, Vec<u8>)> {
    let (mut output, mut errors) = (output, errors);
    let (mut frames, mut answer, mut said) = (Frames::default(), None, Vec::new());
    let mut told = false;
    let mut buffer = vec![0; 1 << 16];
    while output.is_some() || errors.is_some() {
        let mut waiting: Vec<PollFd<'_>> = Vec::with_capacity(2);
        waiting.extend(output.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        waiting.extend(errors.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        match poll(&mut waiting, Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = waiting.iter().map(|pipe| !pipe.revents().is_empty()).collect();
        drop(waiting);
        let (first, second) = (output.is_some(), output.is_some() && ready.get(1).copied().unwrap_or(false));
        let errors_ready = if first { second } else { ready.first().copied().unwrap_or(false) };
        if cancel.is_cancelled() && !told {
            told = true;
            worker.stop();
        }
        if first && ready.first().copied().unwrap_or(false) {
            match read(&mut output, &mut buffer)? {
                Some(bytes) => frames.take(bytes, |event| answer = answer.take().or(wire::tell(event, observer)))?,
                None => output = None,
            }
        }
        if errors_ready {
            match read(&mut errors, &mut buffer)? {
                Some(bytes) => said.extend(bytes.iter().take(SAID_MAX.saturating_sub(said.len()))),
                None => errors = None,
            }
        }
    }
    Ok((answer, said))
}

/// Read the available bytes; `None` at the end.
fn read<'b>(pipe: &mut Option<impl Read>, buffer: &'b mut [u8]) -> std::io::Result<Option<&'b [u8]>> {
    let Some(pipe) = pipe else { return Ok(None) };
    loop {
        match pipe.read(buffer) {
            Ok(0) => return Ok(None),
            Ok(length) => return Ok(buffer.get(..length)),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
