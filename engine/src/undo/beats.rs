//! The beats of a log: when the process that changes the file was alive. A file that was written long after the last one was written by somebody
//! else, who restored it, perhaps.
//!
//! A beat is written once a second at most, and made durable every ten: it says no more than that, and costs no flush in between.

use super::format::{Beat, BEATS};
use rustix::io::retry_on_intr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime};

/// Between two beats, this much time passes at least, and twice as much at most while data moves.
const PAUSE: Duration = Duration::from_secs(1);
/// Between two that are durable.
const DURABLE: Duration = Duration::from_secs(10);

/// Writes the beats of a log.
#[derive(Debug)]
pub struct Beats<'f> {
    file: &'f File,
    nonce: [u8; 16],
    state: Rhythm,
}

/// When the last ones were.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rhythm {
    number: u64,
    last: Option<Instant>,
    durable: Option<Instant>,
}

/// The time of now.
#[must_use]
pub fn now() -> (u64, u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (now.as_secs(), now.subsec_nanos())
}

impl Rhythm {
    /// Write a beat into the log `file`, if it is time for one; the first is durable, and so is one that `must` be.
    ///
    /// # Errors
    /// The kernel's.
    pub fn beat(&mut self, file: &File, nonce: &[u8; 16], must: bool) -> io::Result<()> {
        if self.write(file, nonce, must)? && (must || is_due(self.durable, DURABLE)) {
            retry_on_intr(|| rustix::fs::fdatasync(file))?;
            self.durable = self.last;
        }
        Ok(())
    }

    /// Write a beat in the same way, for a caller that flushes the log at once.
    ///
    /// # Errors
    /// The kernel's.
    pub fn beat_before_flush(&mut self, file: &File, nonce: &[u8; 16]) -> io::Result<()> {
        if self.write(file, nonce, false)? {
            self.durable = self.last;
        }
        Ok(())
    }

    /// Write a beat, if it is time for one. Returns whether it was.
    fn write(&mut self, file: &File, nonce: &[u8; 16], must: bool) -> io::Result<bool> {
        let moment = Instant::now();
        if !must && !is_due(self.last, PAUSE) {
            return Ok(false);
        }
        self.number += 1;
        let [even, odd] = BEATS;
        let at = if self.number.is_multiple_of(2) { even } else { odd };
        file.write_all_at(&Beat { number: self.number, time: now() }.encode(nonce), at)?;
        self.last = Some(moment);
        Ok(true)
    }
}

/// Whether this much time has passed since then.
fn is_due(last: Option<Instant>, pause: Duration) -> bool {
    last.is_none_or(|last| last.elapsed() >= pause)
}

impl<'f> Beats<'f> {
    /// Of a log that another process has begun: this one goes on counting where a clock would be, so that its beats are the newer ones.
    #[must_use]
    pub fn of(file: &'f File, nonce: [u8; 16]) -> Self {
        Self { file, nonce, state: Rhythm { number: now().0, ..Rhythm::default() } }
    }

    /// As [`Rhythm::beat`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn beat(&mut self, must: bool) -> io::Result<()> {
        self.state.beat(self.file, &self.nonce, must)
    }
}
