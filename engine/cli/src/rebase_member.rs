//! One of the images of a rebase of several, in a process of its own: a process that is confined to one image does nothing else.
//! It plans, says so to the process that started it, and changes nothing before that agrees.

use super::signals::{answers, asked};
use super::told::Told;
use instar::error::{Error, Role};
use instar::escape::escape_path;
use instar::operation::{Cancel, Observer, Progress, Session, Stage};
use instar::rebase::{run_rebase, RebaseOutcome, RebaseRequest};
use instar::worker::encode_error;
use instar_guest_abi::ErrorCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// How long it may take until a signal is noticed, in milliseconds.
pub const TICK: libc::c_int = 100;

/// What it says, each in a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// Everything that can refuse the rebase has been asked. The rebase will write this many bytes of the disk.
    Planned(u64),
    /// It has written this many of them.
    Written(u64),
    /// The image names the new parent, or could: the result for programs, and for people.
    Done(Value, String),
    /// It failed: an encoded error.
    Failed(Vec<u8>),
}

/// Tells the process that started it.
struct Member {
    told: Rc<Told>,
    cancel: Cancel,
    says: PipeWriter,
    /// Readable once the change may begin; closed if it must not.
    go: PipeReader,
}

impl Member {
    fn say(&self, said: &Said) {
        let line = serde_json::to_string(said).unwrap_or_default();
        // One write: nobody else has this pipe. If it leads nowhere, nobody is left to be told.
        let _ = (&self.says).write_all(format!("{line}\n").as_bytes());
    }
}

impl Observer for Member {
    fn wants_notes(&self) -> bool {
        self.told.wants_notes()
    }

    fn note(&self, line: &str) {
        self.told.note(line);
    }

    fn warning(&self, line: &str) {
        self.told.warning(line);
    }

    fn agrees(&self, bytes: u64) -> bool {
        self.say(&Said::Planned(bytes));
        loop {
            if self.cancel.is_cancelled() {
                return false;
            }
            let mut wanted = libc::pollfd { fd: self.go.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `wanted` is one valid structure.
            let ready = unsafe { libc::poll(&raw mut wanted, 1, TICK) };
            // A confined process cannot read from a pipe: that it has something to read is the answer.
            if ready > 0 {
                return wanted.revents & libc::POLLIN != 0;
            }
        }
    }

    fn wants_progress(&self) -> bool {
        self.told.wants_progress()
    }

    fn asks_for_progress(&self) -> bool {
        asked()
    }

    fn progress(&self, progress: Progress) {
        answers();
        if progress.stage == Stage::Writing {
            self.say(&Said::Written(progress.done));
        }
    }
}

/// Rebase one image, and end the process.
pub fn run(
    request: &RebaseRequest,
    among: &[PathBuf],
    told: Rc<Told>,
    cancel: Cancel,
    (says, go): (PipeWriter, PipeReader),
    text: impl Fn(&RebaseOutcome) -> String,
) -> ! {
    let descriptor = says.as_raw_fd();
    let member = Rc::new(Member { told, cancel: cancel.clone(), says, go });
    let session = Session::confined(member.clone(), cancel).printing_on(descriptor);
    let said = match run_rebase(request, &session) {
        Ok(outcome) => Said::Done(serde_json::to_value(&outcome).unwrap_or_default(), text(&outcome)),
        Err(error) => Said::Failed(encode_error(&needs_another(error, &request.image, among))),
    };
    member.say(&said);
    // SAFETY: the process holds nothing that has to be written or removed at its end; what it changed is durable.
    unsafe { libc::_exit(0) }
}

/// Whether two names lead to one file.
pub fn same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| std::fs::metadata(path).map(|found| (found.dev(), found.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

/// An image that another one of the same call is below is in use by that one's process.
fn needs_another(error: Error, image: &Path, among: &[PathBuf]) -> Error {
    let other = error.path().and_then(|path| among.iter().find(|other| *other != image && same_file(path, other)));
    match (error.code, other) {
        (ErrorCode::ImageInUse, Some(other)) => {
            let clause = format!(
                "has '{}' below it, which is another image of this call: rebase the lower one in a call of its own first",
                escape_path(other)
            );
            Error::image(image, ErrorCode::ImageInUse, clause).in_role(Role::Image)
        }
        _ => error,
    }
}
