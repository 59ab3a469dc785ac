//! The progress of an operation, in bytes that are durable in the target, so that a full disk never takes reported
//! progress back. A guest flushes only between two steps of its order, which may be far apart, so the meter flushes the
//! target in between. An additional flush never breaks an order.

use super::{DevicePaths, Observer, Progress, Session, Stage};
use crate::devices::{Cache, Device, Devices, Watch};
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The minimum time between two flushes by the meter …
const PAUSE: Duration = Duration::from_secs(1);
/// … and the minimum in multiples of the last flush's duration, so that flushes take a tenth of the time at most.
const SPARING: u32 = 9;

/// The files of the target that the meter flushes.
#[derive(Debug, Default)]
struct Target {
    /// The numbers of its devices.
    devices: Vec<u32>,
    /// Their files; none if the meter does not flush them.
    files: Vec<Arc<File>>,
    /// The earliest time of the next flush.
    next: Option<Instant>,
}

impl Target {
    /// Flush the target, unless that happened a moment ago. Returns whether it was flushed.
    fn flush(&mut self) -> io::Result<bool> {
        if self.files.is_empty() {
            return Ok(false);
        }
        let now = Instant::now();
        let next = *self.next.get_or_insert_with(|| now + PAUSE);
        if now < next {
            return Ok(false);
        }
        for file in &self.files {
            rustix::io::retry_on_intr(|| rustix::fs::fdatasync(file))?;
        }
        let took = now.elapsed();
        self.next = Some(now + took + PAUSE.max(took.saturating_mul(SPARING)));
        Ok(true)
    }
}

/// The counts of a stage.
struct State {
    progress: Progress,
    /// Bytes that moved in the stage, metadata included.
    moved: u64,
    /// Bytes that the guest has read in it: what it compresses is longer than what it writes.
    read: u64,
    /// Bytes of the disk that the guest says it has written.
    told: u64,
    /// Bytes of the overlay's files.
    overlay: u64,
    target: Target,
    observer: Rc<dyn Observer>,
}

/// A counter of progress; its clones share the counts.
#[derive(Clone)]
pub struct Meter(Rc<RefCell<State>>);

impl Meter {
    /// Count a commit from an overlay of `overlay` bytes into the `target` devices. With `flushes`, the meter flushes
    /// the target now and then, so that the observer hears of durable bytes.
    #[must_use]
    pub fn new(
        observer: Rc<dyn Observer>,
        overlay: u64,
        devices: &Devices,
        target: impl Iterator<Item = u32>,
        flushes: bool,
    ) -> Self {
        let numbers: Vec<u32> = target.collect();
        let file = |number: &u32| devices.device(*number).map(|device| Arc::clone(device.file()));
        let files = if flushes { numbers.iter().filter_map(file).collect() } else { Vec::new() };
        Self::begin(observer, overlay, Target { devices: numbers, files, next: None })
    }

    /// Attach a meter to devices that are changed as `cache` says, for an overlay of this many bytes, and make the
    /// session's cancel stop them.
    pub fn attend(devices: &mut Devices, paths: &DevicePaths, session: &Session, cache: Cache, overlay: u64) -> Self {
        let observer = session.observer();
        let flushes = observer.wants_progress() && cache != Cache::Unsafe;
        let meter = Self::new(observer.clone(), overlay, devices, paths.target(), flushes);
        let pace = devices.pace_mut();
        pace.stop_when(session.cancel().clone());
        pace.watched_by(Box::new(meter.clone()));
        meter
    }

    fn begin(observer: Rc<dyn Observer>, overlay: u64, target: Target) -> Self {
        let progress = Progress { stage: Stage::Checking, done: 0, total: 0 };
        observer.progress(progress);
        Self(Rc::new(RefCell::new(State { progress, moved: 0, read: 0, told: 0, overlay, target, observer })))
    }

    /// Set the number of guest bytes to commit.
    pub fn planned(&self, total: u64) {
        self.0.borrow_mut().enter(Stage::Writing, total);
    }

    /// Set the number of bytes of the disk that the guest has written, as it reports. Data that it compresses moves as fewer
    /// bytes.
    pub fn written(&self, done: u64) {
        let mut state = self.0.borrow_mut();
        if state.progress.stage == Stage::Writing {
            state.told = state.told.max(done);
        }
    }

    /// Count the requests that were executed on these devices. If no target device has unflushed writes, all moved
    /// bytes are durable.
    pub fn settle(&self, devices: &Devices) {
        let mut state = self.0.borrow_mut();
        let dirty = |number: &u32| devices.device(*number).is_some_and(Device::is_dirty);
        if state.progress.stage == Stage::Writing && !state.target.devices.iter().any(dirty) {
            state.durable();
        }
        state.answer();
    }

    /// Begin to count the guest bytes that are read back; the data is durable in the target.
    pub fn reading_back(&self, total: u64) {
        let mut state = self.0.borrow_mut();
        state.complete();
        state.enter(Stage::Verifying, total);
    }

    /// Begin to count the guest bytes of the disk that is hashed.
    pub fn hashing(&self, total: u64) {
        let mut state = self.0.borrow_mut();
        state.complete();
        state.enter(Stage::Hashing, total);
    }

    /// Begin to count the emptying of the overlay; the data is durable in the target.
    pub fn emptying(&self) {
        let mut state = self.0.borrow_mut();
        state.complete();
        let overlay = state.overlay;
        state.enter(Stage::Emptying, overlay);
    }

    /// Report the end of the commit; a dry run reports none.
    pub fn done(&self) {
        let mut state = self.0.borrow_mut();
        if state.moved > 0 || matches!(state.progress.stage, Stage::Verifying | Stage::Hashing | Stage::Emptying) {
            state.complete();
        }
    }
}

impl State {
    fn enter(&mut self, stage: Stage, total: u64) {
        self.progress = Progress { stage, done: 0, total };
        (self.moved, self.read, self.told) = (0, 0, 0);
        self.observer.progress(self.progress);
    }

    /// End the stage.
    fn complete(&mut self) {
        self.tell(self.progress.total);
    }

    /// The bytes that moved so far. They include metadata, so the total is reached only when the stage is over.
    fn so_far(&self) -> u64 {
        let read = if self.progress.stage == Stage::Writing { self.read } else { 0 };
        self.moved.max(read).max(self.told).min(self.progress.total.saturating_sub(1))
    }

    /// Record that all bytes that moved so far are durable.
    fn durable(&mut self) {
        self.tell(self.so_far());
    }

    /// Answer a question for the progress with the moved bytes, which need not be durable.
    fn answer(&self) {
        if self.observer.asks_for_progress() {
            let done = self.so_far().max(self.progress.done);
            self.observer.progress(Progress { done, ..self.progress });
        }
    }

    fn tell(&mut self, done: u64) {
        if done > self.progress.done {
            self.progress.done = done;
            self.observer.progress(self.progress);
        }
    }
}

impl Watch for Meter {
    fn moved(&mut self, bytes: u64) {
        let mut state = self.0.borrow_mut();
        state.moved = state.moved.saturating_add(bytes);
        if matches!(state.progress.stage, Stage::Verifying | Stage::Hashing | Stage::Emptying) {
            state.durable();
        }
    }

    fn read(&mut self, bytes: u64) {
        let mut state = self.0.borrow_mut();
        state.read = state.read.saturating_add(bytes);
    }

    fn settle(&mut self) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if state.progress.stage == Stage::Writing && state.target.flush()? {
            state.durable();
        }
        state.answer();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[derive(Default)]
    struct Kept(Cell<Vec<(Stage, u64, u64)>>, Cell<bool>);

    impl Observer for Kept {
        fn asks_for_progress(&self) -> bool {
            self.1.take()
        }

        fn progress(&self, progress: Progress) {
            let told = (progress.stage, progress.done, progress.total);
            self.0.set(self.0.take().into_iter().chain([told]).collect());
        }
    }

    #[test]
    fn only_what_is_durable_counts() {
        let kept = Rc::new(Kept::default());
        let mut meter = Meter::begin(kept.clone(), 1000, Target::default());
        meter.planned(1600);
        meter.moved(300);
        assert_eq!(kept.0.take(), [(Stage::Checking, 0, 0), (Stage::Writing, 0, 1600)], "written, and not flushed");
        Meter::settle(&meter, &Devices::new());
        assert_eq!(kept.0.take(), [(Stage::Writing, 300, 1600)]);
        meter.moved(1300);
        Meter::settle(&meter, &Devices::new());
        assert_eq!(kept.0.take(), [(Stage::Writing, 1599, 1600)], "the guest has not said that it is all");
        meter.emptying();
        meter.moved(500);
        meter.done();
        let rest = [
            (Stage::Writing, 1600, 1600),
            (Stage::Emptying, 0, 1000),
            (Stage::Emptying, 500, 1000),
            (Stage::Emptying, 1000, 1000),
        ];
        assert_eq!(kept.0.take(), rest);
    }

    #[test]
    fn what_is_compressed_counts_by_the_bytes_of_the_disk() {
        let kept = Rc::new(Kept::default());
        let mut meter = Meter::begin(kept.clone(), 1000, Target::default());
        meter.planned(1600);
        Watch::read(&mut meter, 800);
        meter.moved(100);
        Meter::settle(&meter, &Devices::new());
        // A source that is compressed itself: the guest reads little, and writes little.
        meter.written(1200);
        Meter::settle(&meter, &Devices::new());
        meter.written(u64::MAX);
        Meter::settle(&meter, &Devices::new());
        let told: Vec<u64> = kept.0.take().into_iter().map(|(_, done, _)| done).collect();
        assert_eq!(told, [0, 0, 800, 1200, 1599]);
    }

    #[test]
    fn who_asks_is_told_what_moved() {
        let kept = Rc::new(Kept::default());
        let mut meter = Meter::begin(kept.clone(), 1000, Target::default());
        kept.1.set(true);
        Meter::settle(&meter, &Devices::new());
        meter.planned(1600);
        kept.0.take();
        meter.moved(300);
        kept.1.set(true);
        assert!(Watch::settle(&mut meter).is_ok() && Watch::settle(&mut meter).is_ok());
        assert_eq!(kept.0.take(), [(Stage::Writing, 300, 1600)], "once for each question");
        Meter::settle(&meter, &Devices::new());
        assert_eq!(kept.0.take(), [(Stage::Writing, 300, 1600)], "it is durable now");
    }

    #[test]
    fn nothing_is_done_in_a_dry_run() {
        let kept = Rc::new(Kept::default());
        let meter = Meter::begin(kept.clone(), 1000, Target::default());
        meter.planned(100);
        meter.done();
        assert_eq!(kept.0.take(), [(Stage::Checking, 0, 0), (Stage::Writing, 0, 100)]);
    }
}
