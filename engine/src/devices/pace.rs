//! The speed at which data moves, its observer, and its brake.

use crate::cancel::Cancel;
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

/// A pause is cut into pieces of this length: between two of them the operator can interrupt.
const NAP: Duration = Duration::from_millis(50);
/// Bytes that are moved between two pauses, at least.
const MIN_PIECE: u64 = 4 << 10;

/// An observer of moved data.
///
/// # Example
///
/// Count the bytes:
///
/// ```
/// use instar::devices::Watch;
///
/// #[derive(Default)]
/// struct Total(u64);
///
/// impl Watch for Total {
///     fn moved(&mut self, bytes: u64) {
///         self.0 = self.0.saturating_add(bytes);
///     }
/// }
///
/// let mut total = Total::default();
/// total.moved(512);
/// assert_eq!(total.0, 512);
/// ```
pub trait Watch {
    /// Report that `bytes` more have moved.
    fn moved(&mut self, bytes: u64);

    /// Report that the guest has read `bytes` more into its memory, to write them in another form.
    fn read(&mut self, bytes: u64) {
        let _ = bytes;
    }

    /// Data has moved, and nothing is half done: a moment for what takes longer.
    ///
    /// # Errors
    /// What the movement then fails with.
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A limit in bytes per second.
#[derive(Clone, Copy, Debug)]
struct Limit {
    rate: u64,
    /// When what has moved so far may have moved.
    due: Instant,
}

/// A companion of every movement of data, which limits its speed, reports it, and may stop it.
#[derive(Default)]
pub struct Pace {
    cancel: Option<Cancel>,
    limit: Option<Limit>,
    watch: Option<Box<dyn Watch>>,
    /// Who keeps what changes, and says that this process lives.
    alive: Option<Box<dyn FnMut() -> io::Result<()>>>,
}

impl fmt::Debug for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pace").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Pace {
    /// Let `cancel` end the operation: a long movement then fails with EINTR.
    pub fn stop_when(&mut self, cancel: Cancel) {
        self.cancel = Some(cancel);
    }

    /// Move at most `rate` bytes per second; 0 for no limit. Idle time is not credited.
    pub fn limit(&mut self, rate: u64) {
        self.limit = (rate > 0).then(|| Limit { rate, due: Instant::now() });
    }

    /// Whether there is a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.limit.is_some()
    }

    /// Report moved data to `watch`.
    pub fn watched_by(&mut self, watch: Box<dyn Watch>) {
        self.watch = Some(watch);
    }

    /// Call `alive`, too, whenever data has moved; its error ends the movement.
    pub(super) fn tell_alive(&mut self, alive: Box<dyn FnMut() -> io::Result<()>>) {
        self.alive = Some(alive);
    }

    /// Return the number of bytes that may move at once: those of a tenth of a second, but at most `most`.
    #[must_use]
    pub fn piece(&self, most: u64) -> u64 {
        self.limit.map_or(most, |limit| (limit.rate / 10).max(MIN_PIECE).min(most))
    }

    /// Fail if the operator wants to stop.
    ///
    /// # Errors
    /// EINTR.
    pub fn go_on(&self) -> io::Result<()> {
        if self.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
            return Err(io::Error::from_raw_os_error(libc::EINTR));
        }
        Ok(())
    }

    /// Record moved data, and pause as long as the limit requires.
    ///
    /// # Errors
    /// EINTR, if the operator wants to stop meanwhile.
    pub fn moved(&mut self, bytes: u64) -> io::Result<()> {
        self.passed(bytes);
        if let Some(watch) = &mut self.watch {
            watch.settle()?;
        }
        if let Some(alive) = &mut self.alive {
            alive()?;
        }
        let Some(limit) = &mut self.limit else { return Ok(()) };
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(limit.rate);
        let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let now = Instant::now();
        limit.due = limit.due.max(now).checked_add(takes).unwrap_or(now);
        let due = limit.due;
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.go_on()?;
            std::thread::sleep(left.min(NAP));
        }
    }

    /// Record data that the guest has read, which is not limited.
    pub fn read(&mut self, bytes: u64) {
        if let Some(watch) = &mut self.watch {
            watch.read(bytes);
        }
    }

    /// Record zeroes, which take no space: they are reported but not limited.
    pub fn passed(&mut self, bytes: u64) {
        if let Some(watch) = &mut self.watch {
            watch.moved(bytes);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    struct Count(Rc<Cell<u64>>);

    impl Watch for Count {
        fn moved(&mut self, bytes: u64) {
            self.0.set(self.0.get() + bytes);
        }
    }

    #[test]
    fn a_limit_takes_its_time_and_no_more_is_moved_at_once() {
        let mut pace = Pace::default();
        assert_eq!(pace.piece(1 << 30), 1 << 30);
        pace.limit(1 << 20);
        assert_eq!((pace.piece(1 << 30), pace.piece(5)), ((1 << 20) / 10, 5));
        let start = Instant::now();
        for _ in 0..4 {
            pace.moved(1 << 16).unwrap();
        }
        // A quarter of a second's worth: never less.
        assert!(start.elapsed() >= Duration::from_millis(250));
        pace.limit(0);
        pace.moved(u64::MAX).unwrap();
        pace.limit(1);
        assert_eq!(pace.piece(1 << 30), MIN_PIECE);
    }

    #[test]
    fn a_pause_can_be_interrupted() {
        let mut pace = Pace::default();
        pace.limit(1);
        let cancel = Cancel::new();
        pace.stop_when(cancel.clone());
        cancel.cancel();
        assert_eq!(pace.moved(1 << 40).unwrap_err().raw_os_error(), Some(libc::EINTR));
        assert!(pace.go_on().is_err());
    }

    #[test]
    fn everything_is_seen() {
        let seen = Rc::new(Cell::new(0));
        let mut pace = Pace::default();
        pace.watched_by(Box::new(Count(Rc::clone(&seen))));
        pace.moved(3).unwrap();
        pace.passed(4);
        assert_eq!(seen.get(), 7);
    }
}
