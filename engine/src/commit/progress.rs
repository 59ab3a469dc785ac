//! `-p`: how far a commit is, on stderr: a bar on a terminal, lines elsewhere.
//!
//! What counts is what is durable in the target, so that no line promises what a full disk then breaks. A guest flushes
//! only between two steps of its order, which may be far apart: in between, the target is flushed from here. One flush more
//! never breaks an order.

use crate::devices::{Devices, Watch};
use crate::terminal::say;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is done, bar, percentage, bytes, time left: within the 80 columns of a terminal.
const TEMPLATE: &str = "{msg} [{bar:20}] {percent:>3}% {bytes}/{total_bytes} {eta} left";
/// As long as it is not known how much there is to do.
const CHECKING: &str = "{msg}";
/// Between two flushes from here this much time passes at least …
const PAUSE: Duration = Duration::from_secs(1);
/// … and so many times as long as the one before took: they may take a tenth of the time.
const SPARING: u32 = 9;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing yet: nothing is changed before there is a plan.
    Before,
    /// Bytes that are committed.
    Writing,
    /// Bytes of the overlay that are given back.
    Emptying,
}

/// How a commit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Well.
    Done,
    /// Well, and it was to change nothing.
    DryRun,
    /// With an error, which has a line of its own.
    Failed,
}

/// The target, as far as it has to be flushed.
#[derive(Debug, Default)]
struct Target {
    /// The numbers of its devices.
    devices: Vec<u32>,
    /// Their files; none where flushing means nothing.
    files: Vec<Arc<File>>,
    /// When the next flush from here may be.
    next: Option<Instant>,
}

impl Target {
    /// Flush it, unless that was done a moment ago. Returns whether it was done.
    fn flush(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        let next = *self.next.get_or_insert_with(|| now + PAUSE);
        if self.files.is_empty() || now < next {
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

/// How far it is, and how that is shown.
#[derive(Debug)]
struct State {
    phase: Phase,
    /// Bytes of the phase.
    total: u64,
    /// Bytes that moved in it, metadata included.
    moved: u64,
    /// Bytes of these that are durable, without what is more than the whole.
    done: u64,
    /// The percent that the last line had.
    shown: u64,
    /// Bytes of the overlay's files.
    overlay: u64,
    target: Target,
    bar: Option<ProgressBar>,
    print: fn(&str),
}

/// Shows progress; clones show the same.
#[derive(Clone, Debug)]
pub struct Progress(Rc<RefCell<State>>);

impl Progress {
    /// Of a commit from an overlay of so many `bytes` into the `target` devices. `durable`: flushing means something.
    #[must_use]
    pub fn new(overlay: u64, devices: &Devices, target: impl Iterator<Item = u32>, durable: bool) -> Self {
        let numbers: Vec<u32> = target.collect();
        let file = |number: &u32| devices.device(*number).map(|device| Arc::clone(device.file()));
        let files = if durable { numbers.iter().filter_map(file).collect() } else { Vec::new() };
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(CHECKING) {
                bar.set_style(style);
            }
            bar.set_message("checking");
            bar
        });
        let target = Target { devices: numbers, files, next: None };
        Self(Rc::new(RefCell::new(State::new(overlay, target, bar, say))))
    }

    /// So many guest bytes are to be committed.
    pub fn planned(&self, total: u64) {
        self.0.borrow_mut().begin(Phase::Writing, total, "committing");
    }

    /// The guest's requests were executed on these devices: where nothing of the target is left to be flushed, everything
    /// that moved is durable.
    pub fn settle(&self, devices: &Devices) {
        let mut state = self.0.borrow_mut();
        let dirty = |number: &u32| devices.device(*number).is_some_and(crate::devices::Device::is_dirty);
        if state.phase == Phase::Writing && !state.target.devices.iter().any(dirty) {
            state.durable();
        }
    }

    /// The data is durable in the target: the overlay is emptied.
    pub fn emptying(&self) {
        let mut state = self.0.borrow_mut();
        state.complete();
        let overlay = state.overlay;
        state.begin(Phase::Emptying, overlay, "emptying");
        if state.bar.is_none() {
            (state.print)("instar: emptying the overlay\n");
        }
    }

    /// It is over.
    pub fn end(&self, ending: Ending) {
        self.0.borrow_mut().end(ending);
    }
}

impl State {
    fn new(overlay: u64, target: Target, bar: Option<ProgressBar>, print: fn(&str)) -> Self {
        let phase = Phase::Before;
        Self { phase, total: 0, moved: 0, done: 0, shown: 0, overlay, target, bar, print }
    }

    fn begin(&mut self, phase: Phase, total: u64, message: &'static str) {
        (self.phase, self.total, self.moved, self.done, self.shown) = (phase, total, 0, 0, 0);
        if let Some(bar) = &self.bar {
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(message);
            bar.set_length(total);
            bar.set_position(0);
            bar.reset_eta();
        }
    }

    /// The phase is over.
    fn complete(&mut self) {
        self.show(self.total);
    }

    /// What moved so far is durable. Metadata moved, too: the whole is reached only when the phase is over.
    fn durable(&mut self) {
        self.show(self.moved.min(self.total.saturating_sub(1)));
    }

    /// So much is done: the position of the bar, or a line for each percent at most. Nothing of nothing is not shown.
    fn show(&mut self, done: u64) {
        self.done = self.done.max(done);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
            return;
        }
        let percent = self.percent();
        if percent > self.shown {
            self.shown = percent;
            let what = if self.phase == Phase::Emptying { "emptying the overlay: " } else { "" };
            let line = format!("instar: {what}{percent} % ({} of {} bytes)\n", self.done, self.total);
            (self.print)(&line);
        }
    }

    /// Rounded down.
    fn percent(&self) -> u64 {
        let percent = (u128::from(self.done) * 100).checked_div(u128::from(self.total)).unwrap_or(0);
        u64::try_from(percent).unwrap_or(100)
    }

    fn end(&mut self, ending: Ending) {
        if ending == Ending::Done {
            self.complete();
        }
        // The last line takes the place of the bar.
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let line = match (ending, self.phase) {
            (Ending::Done, _) => "instar: done\n".to_owned(),
            (Ending::DryRun, _) => "instar: done: a dry run writes nothing\n".to_owned(),
            // Nothing was begun: the error says all there is to say.
            (Ending::Failed, Phase::Before) => return,
            (Ending::Failed, Phase::Writing) => {
                format!("instar: stopped at {} % ({} of {} bytes)\n", self.percent(), self.done, self.total)
            }
            (Ending::Failed, Phase::Emptying) => "instar: stopped while emptying the overlay\n".to_owned(),
        };
        (self.print)(&line);
    }
}

impl Watch for Progress {
    fn moved(&mut self, bytes: u64) {
        let mut state = self.0.borrow_mut();
        state.moved = state.moved.saturating_add(bytes);
        if state.phase == Phase::Emptying {
            state.durable();
        }
    }

    fn settle(&mut self) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if state.phase == Phase::Writing && state.target.flush()? {
            state.durable();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local!(static PRINTED: Cell<Vec<String>> = const { Cell::new(Vec::new()) });

    fn keep(text: &str) {
        PRINTED.set(PRINTED.take().into_iter().chain([text.trim_start_matches("instar: ").to_owned()]).collect());
    }

    fn progress() -> Progress {
        Progress(Rc::new(RefCell::new(State::new(1000, Target::default(), None, keep))))
    }

    fn lines() -> Vec<String> {
        PRINTED.take()
    }

    #[test]
    fn only_what_is_durable_counts() {
        let mut progress = progress();
        progress.planned(1600);
        progress.moved(300);
        assert_eq!(lines(), [""; 0], "written, and not flushed");
        progress.settle(&Devices::new());
        assert_eq!(lines(), ["18 % (300 of 1600 bytes)\n"]);
        progress.moved(1300);
        progress.settle(&Devices::new());
        assert_eq!(lines(), ["99 % (1599 of 1600 bytes)\n"], "the guest has not said that it is all");
        progress.emptying();
        progress.moved(500);
        progress.end(Ending::Done);
        let rest = [
            "100 % (1600 of 1600 bytes)\n",
            "emptying the overlay\n",
            "emptying the overlay: 50 % (500 of 1000 bytes)\n",
            "emptying the overlay: 100 % (1000 of 1000 bytes)\n",
            "done\n",
        ];
        assert_eq!(lines(), rest);
    }

    #[test]
    fn the_last_line_says_how_it_ended() {
        let ended = |total: Option<u64>, moved: u64, ending: Ending| {
            let mut progress = progress();
            if let Some(total) = total {
                progress.planned(total);
            }
            progress.moved(moved);
            progress.end(ending);
            lines()
        };
        assert_eq!(ended(None, 0, Ending::Failed), [""; 0]);
        assert_eq!(ended(Some(100), 100, Ending::Failed), ["stopped at 0 % (0 of 100 bytes)\n"]);
        assert_eq!(ended(Some(100), 0, Ending::DryRun), ["done: a dry run writes nothing\n"]);
        assert_eq!(ended(Some(0), 0, Ending::Done), ["done\n"], "nothing of nothing is no percentage");
        assert_eq!(ended(Some(100), 100, Ending::Done), ["100 % (100 of 100 bytes)\n", "done\n"]);
    }
}
