//! `--progress=json`: what a command does, as lines of JSON with the names of QEMU's `query-jobs`.

use super::output::error_value;
use instar::error::Error;
use instar::escape::escape_json;
use instar::operation::{Progress, Stage};
use serde::Serialize;
use serde_json::Value;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Between two lines that say the same but for their numbers, this much time passes at least.
const PAUSE: Duration = Duration::from_millis(250);

/// A state of QEMU's `JobStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// The command has begun.
    Created,
    /// It works.
    Running,
    /// It has failed, or was interrupted.
    Aborting,
    /// It has ended.
    Concluded,
}

/// A line. The whole counts all stages, so that what is done never becomes less; how much there is to do, is known of the stages
/// that have begun.
#[derive(Serialize)]
struct Line<'l> {
    #[serde(rename = "type")]
    job: &'static str,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<&'static str>,
    #[serde(rename = "current-progress")]
    current: u64,
    #[serde(rename = "total-progress")]
    total: u64,
    /// Bytes per second, on average since the stage began.
    speed: u64,
    /// Seconds since the command began.
    elapsed: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'l str>,
    /// What people read in a line of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<&'l str>,
    /// The same of a check: what it found.
    #[serde(skip_serializing_if = "Option::is_none")]
    finding: Option<&'l str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'l Value>,
}

/// The lines go to standard error, and the last one had the error of the command.
static ERROR_IS_TOLD: AtomicBool = AtomicBool::new(false);

/// Whether the error of the command is on standard error already, in the last line of progress: a reader of those lines meets nothing
/// else there.
#[must_use]
pub fn error_is_told() -> bool {
    ERROR_IS_TOLD.load(Relaxed)
}

/// Tells programs how far a command is.
#[derive(Debug)]
pub struct Lines {
    job: &'static str,
    out: RawFd,
    began: Instant,
    stage_began: Instant,
    /// Bytes of the stages that are over.
    before: u64,
    last: Option<Progress>,
    /// When the last line was written.
    told: Instant,
}

impl Lines {
    /// A command has begun. `None` if nothing can be written to the descriptor.
    #[must_use]
    pub fn begin(job: &'static str, out: RawFd) -> Option<Self> {
        // SAFETY: the calls take numbers. The caller has left the descriptor open for this process to write to; a program that it
        // starts does not get it.
        let mode = unsafe { libc::fcntl(out, libc::F_GETFL) };
        if mode < 0 || mode & libc::O_ACCMODE == libc::O_RDONLY {
            return None;
        }
        if out > libc::STDERR_FILENO {
            // SAFETY: as above.
            unsafe { libc::fcntl(out, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        let now = Instant::now();
        let lines = Self { job, out, began: now, stage_began: now, before: 0, last: None, told: now };
        lines.write(Status::Created, None, None, false);
        Some(lines)
    }

    /// The descriptor.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.out
    }

    /// So far it is. `asked`: it is said now, whenever the last line was written.
    pub fn show(&mut self, progress: Progress, asked: bool) {
        let new = self.last.is_none_or(|last| last.stage != progress.stage);
        if new {
            self.before += self.last.map_or(0, |last| last.total);
            self.stage_began = Instant::now();
        }
        self.last = Some(progress);
        if new || asked || self.told.elapsed() >= PAUSE {
            self.told = Instant::now();
            self.write(Status::Running, None, None, new);
        }
    }

    /// The command has ended: the last line has its result, as `--output json` prints it.
    pub fn conclude(&self, result: Result<&impl Serialize, &Error>) {
        let (value, error) = match result {
            Ok(result) => (serde_json::to_value(result).unwrap_or_default(), None),
            Err(error) => (error_value(error), Some(error.message.as_str())),
        };
        if error.is_some() {
            self.write(Status::Aborting, error, None, true);
        }
        self.write(Status::Concluded, error, Some(&value), true);
        if error.is_some() && self.out == libc::STDERR_FILENO {
            ERROR_IS_TOLD.store(true, Relaxed);
        }
    }

    /// Say a warning, where people would have a line of their own on the same descriptor.
    pub fn warn(&self, warning: &str) {
        self.write_line(&Line { warning: Some(warning), ..self.line(Status::Running) });
    }

    /// Say what a check found, under the same condition.
    pub fn find(&self, finding: &str) {
        self.write_line(&Line { finding: Some(finding), ..self.line(Status::Running) });
    }

    /// Whether people would read their lines from the same descriptor.
    #[must_use]
    pub fn on_standard_error(&self) -> bool {
        self.out == libc::STDERR_FILENO
    }

    fn line(&self, status: Status) -> Line<'_> {
        let Progress { stage, done, total } =
            self.last.unwrap_or(Progress { stage: Stage::Checking, done: 0, total: 0 });
        let running = self.stage_began.elapsed().as_secs_f64();
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a rate"
        )]
        let speed = if running > 0.0 { (done as f64 / running) as u64 } else { 0 };
        Line {
            job: self.job,
            status,
            stage: (status == Status::Running).then(|| name(stage)),
            current: self.before + done,
            total: self.before + total,
            speed,
            elapsed: (self.began.elapsed().as_secs_f64() * 1e3).round() / 1e3,
            error: None,
            warning: None,
            finding: None,
            result: None,
        }
    }

    /// Write a line. One that only has other numbers than the line before is left out where its reader lags behind: the command
    /// does not wait for it.
    fn write(&self, status: Status, error: Option<&str>, result: Option<&Value>, counts: bool) {
        if !counts && !is_ready(self.out, 0) {
            return;
        }
        self.write_line(&Line { error, result, ..self.line(status) });
    }

    fn write_line(&self, line: &Line<'_>) {
        let text = escape_json(&serde_json::to_string(line).unwrap_or_default());
        write_all(self.out, format!("{text}\n").as_bytes());
    }
}

/// What a stage is called.
fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Checking => "checking",
        Stage::Writing => "writing",
        Stage::Verifying => "verifying",
        Stage::Hashing => "hashing",
        Stage::Emptying => "emptying",
        Stage::Reading => "reading",
    }
}

/// Wait at most this many milliseconds until something can be written, or never will be; -1 waits without limit.
fn is_ready(out: RawFd, milliseconds: libc::c_int) -> bool {
    let mut wanted = libc::pollfd { fd: out, events: libc::POLLOUT, revents: 0 };
    // SAFETY: `wanted` is one valid structure.
    unsafe { libc::poll(&raw mut wanted, 1, milliseconds) != 0 }
}

/// Write all of it. It is lost where it cannot be written: no line decides how a command ends.
fn write_all(out: RawFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the bytes are readable; the descriptor is open for as long as the process lives.
        let written = unsafe { libc::write(out, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(written) {
            Ok(0) => return,
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(_) => match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => drop(is_ready(out, -1)),
                _ => return,
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_guest_abi::ErrorCode;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    /// What is told, without what depends on time.
    fn told(result: Result<u32, Error>, all: &[(Stage, u64, u64, bool)]) -> Vec<Value> {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut lines = Lines::begin("commit", writer.as_raw_fd()).unwrap();
        all.iter().for_each(|&(stage, done, total, asked)| lines.show(Progress { stage, done, total }, asked));
        lines.conclude(result.as_ref());
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let mut values: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for value in &mut values {
            assert!(value["elapsed"].as_f64().unwrap() < 60.0 && value["speed"].is_u64());
            let object = value.as_object_mut().unwrap();
            object.retain(|key, _| !["type", "speed", "elapsed"].contains(&key.as_str()));
        }
        values
    }

    #[test]
    fn what_is_done_never_becomes_less() {
        use Stage::{Checking, Emptying, Writing};
        let all = [
            (Checking, 0, 0, false),
            (Writing, 0, 100, false),
            (Writing, 30, 100, true),
            (Writing, 31, 100, false),
            (Writing, 100, 100, false),
            (Emptying, 0, 7, false),
            (Emptying, 7, 7, false),
        ];
        let running = |stage, current, total| serde_json::json!({"status": "running", "stage": stage, "current-progress": current, "total-progress": total});
        let expected = [
            serde_json::json!({"status": "created", "current-progress": 0, "total-progress": 0}),
            running("checking", 0, 0),
            running("writing", 0, 100),
            running("writing", 30, 100),
            running("emptying", 100, 107),
            serde_json::json!({"status": "concluded", "current-progress": 107, "total-progress": 107, "result": 5}),
        ];
        assert_eq!(told(Ok(5), &all), expected);
    }

    #[test]
    fn a_failure_is_told_as_it_is_printed() {
        let error = Error::new(ErrorCode::NoSpace, "there is none");
        let told = told(Err(error), &[(Stage::Writing, 3, 9, false)]);
        let (last, before) = (&told[told.len() - 1], &told[told.len() - 2]);
        assert_eq!((&before["status"], &before["error"]), (&"aborting".into(), &"there is none".into()));
        assert_eq!((&last["status"], &last["error"]), (&"concluded".into(), &"there is none".into()));
        assert_eq!(last["result"]["error"]["name"], "ERROR_NO_SPACE");
        assert_eq!(last["current-progress"], 3);
    }

    #[test]
    fn nobody_waits_for_a_reader_that_lags_behind() {
        let (reader, writer) = io::pipe().unwrap();
        let mut lines = Lines::begin("commit", writer.as_raw_fd()).unwrap();
        // Many times what a pipe holds.
        (0..20_000).for_each(|done| lines.show(Progress { stage: Stage::Writing, done, total: 20_000 }, true));
        drop(reader);
        lines.conclude(Ok(&1));
    }

    #[test]
    fn a_descriptor_has_to_be_writable() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(Lines::begin("commit", reader.as_raw_fd()).is_none());
        assert!(Lines::begin("commit", 1 << 20).is_none());
    }
}
