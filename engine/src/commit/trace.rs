//! What `-v` tells, on stderr.

use crate::cli::escape::printable;
use std::fmt::Display;
use std::io::Write;
use std::time::{Duration, Instant};

/// Tells what is done and how long it takes, if anyone wants to know.
#[derive(Clone, Debug)]
pub struct Trace {
    verbose: bool,
    started: Instant,
    lap: Instant,
}

impl Trace {
    /// Times count from `started` on.
    #[must_use]
    pub fn new(verbose: bool, started: Instant) -> Self {
        Self { verbose, started, lap: started }
    }

    /// One line.
    pub fn line(&self, text: impl Display) {
        if self.verbose {
            // Nobody to tell if stderr is gone.
            let _ = writeln!(std::io::stderr(), "instar: {}", printable(&text.to_string()));
        }
    }

    /// A part is done, and took the time since the part before.
    pub fn lap(&mut self, part: &str) {
        let now = Instant::now();
        self.time(part, now - self.lap);
        self.lap = now;
    }

    /// The time that a part took.
    pub fn time(&self, part: &str, time: Duration) {
        self.line(format_args!("time: {part}: {:.3} ms", time.as_secs_f64() * 1e3));
    }

    /// The time since the start.
    pub fn total(&self) {
        self.time("in all", self.started.elapsed());
    }
}
