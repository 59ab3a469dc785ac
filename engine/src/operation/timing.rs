//! The durations of the parts of an operation.

use std::time::{Duration, Instant};

/// Marks along an operation, each with the time since the one before it.
#[derive(Clone, Debug)]
pub struct Timing {
    last: Instant,
    parts: Vec<(&'static str, Duration)>,
}

impl Default for Timing {
    /// Nothing was measured.
    fn default() -> Self {
        Self { last: Instant::now(), parts: Vec::new() }
    }
}

impl Timing {
    /// Start now. If somebody `asks` for it, the first part is the time since the kernel started the process: to find that out
    /// takes a while itself.
    #[must_use]
    pub fn start(asks: bool) -> Self {
        let since = asks.then(since_process_start).flatten();
        let parts = since.into_iter().map(|time| ("process started, arguments read", time)).collect();
        Self { last: Instant::now(), parts }
    }

    /// End a part.
    pub fn mark(&mut self, part: &'static str) {
        let now = Instant::now();
        self.parts.push((part, now - self.last));
        self.last = now;
    }

    /// Return the parts so far.
    #[must_use]
    pub fn parts(&self) -> &[(&'static str, Duration)] {
        &self.parts
    }
}

/// Time since the kernel started this process, to its clock tick (field 22 of `/proc/self/stat`, `proc(5)`).
fn since_process_start() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name, in parentheses, may hold anything.
    let started: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let tick = rustix::param::clock_ticks_per_second().max(1);
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(u64::try_from(now.tv_sec).ok()?, u32::try_from(now.tv_nsec).ok()?);
    let started = Duration::from_nanos(started.checked_mul(1_000_000_000 / tick)?);
    Some(now.saturating_sub(started))
}
