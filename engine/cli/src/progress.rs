//! `-p`: how far a commit is, on stderr: a bar on a terminal, lines elsewhere.

use super::terminal::{say, width_of};
use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use instar::bytes::format_size;
use instar::operation::{Progress, Stage};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// What is done, bar, percentage, bytes, rate, time left: within the 80 columns of a terminal.
const TEMPLATE: &str = "{msg} [{bar:10}] {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
/// What of that a narrower terminal shows.
const SHORT_TEMPLATE: &str = "{msg} {percent:>3}% {bytes}/{total_bytes}";
const SHORTEST_TEMPLATE: &str = "{msg} {percent:>3}%";
/// When all bytes have moved, and only tables and the last flush are left: nobody knows how long those take.
const FINISHING: &str = "{msg} [{bar:10}] {percent:>3}% {bytes}/{total_bytes} finishing";
/// What of that a narrower terminal shows.
const SHORT_FINISHING: &str = "{msg} {percent:>3}% finishing";
/// As long as it is not known how much there is to do.
const CHECKING: &str = "{msg}";

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

/// Shows how far a commit is.
#[derive(Debug)]
pub struct Shown {
    bar: Option<ProgressBar>,
    template: &'static str,
    print: fn(&str),
    last: Progress,
    /// When the stage began.
    began: Instant,
    /// The percent that the last line had.
    percent: u64,
}

impl Shown {
    /// On stderr.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(CHECKING) {
                bar.set_style(style);
            }
            bar
        });
        Self::with(bar, say)
    }

    fn with(bar: Option<ProgressBar>, print: fn(&str)) -> Self {
        let last = Progress { stage: Stage::Checking, done: 0, total: 0 };
        let template = template(width_of(std::io::stderr()));
        Self { bar, template, print, last, began: Instant::now(), percent: 0 }
    }

    /// So far it is.
    pub fn show(&mut self, progress: Progress) {
        if progress.stage != self.last.stage || progress.stage == Stage::Checking {
            self.begin(progress);
        }
        let finishes = is_finishing(progress) && !is_finishing(self.last);
        self.last = progress;
        if let Some(bar) = &self.bar {
            if finishes {
                set_template(bar, if self.template == TEMPLATE { FINISHING } else { SHORT_FINISHING });
            }
            bar.set_position(progress.done);
            return;
        }
        // A line for each percent at most, and one for the end of a stage. Nothing of nothing is not shown.
        let percent = percent(progress);
        if percent > self.percent || finishes {
            self.percent = percent;
            (self.print)(&line(progress, &pace(progress, self.began.elapsed())));
        }
    }

    /// Say a line; a bar goes on below it.
    pub fn aside(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| (self.print)(line)),
            None => (self.print)(line),
        }
    }

    fn begin(&mut self, progress: Progress) {
        (self.percent, self.began) = (0, Instant::now());
        let message = match progress.stage {
            Stage::Checking => "checking",
            Stage::Writing => "writing",
            Stage::Verifying => "verifying",
            Stage::Hashing => "hashing",
            Stage::Emptying => "emptying",
            Stage::Reading => "reading",
        };
        match &self.bar {
            Some(bar) => {
                set_template(bar, if progress.total == 0 { CHECKING } else { self.template });
                bar.set_message(message);
                bar.set_length(progress.total);
                bar.set_position(0);
                bar.reset_eta();
            }
            None if progress.stage == Stage::Verifying => (self.print)("instar: reading back what was written\n"),
            None if progress.stage == Stage::Hashing => (self.print)("instar: hashing the disk\n"),
            None if progress.stage == Stage::Emptying => (self.print)("instar: emptying the overlay\n"),
            None => {}
        }
    }

    /// It is over: the last line says how, and takes the place of the bar.
    pub fn end(&mut self, ending: Ending) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let line = match (ending, self.last.stage) {
            (Ending::Done, _) => "instar: done\n".to_owned(),
            (Ending::DryRun, _) => "instar: done: a dry run writes nothing\n".to_owned(),
            // Nothing was begun: the error says all there is to say.
            (Ending::Failed, Stage::Checking) => return,
            (Ending::Failed, Stage::Writing) if self.last.total == 0 => return,
            (Ending::Failed, Stage::Writing | Stage::Reading) => {
                let Progress { done, total, .. } = self.last;
                format!("instar: stopped at {} % ({})\n", percent(self.last), amount(done, total))
            }
            (Ending::Failed, Stage::Verifying) => "instar: stopped while reading back what was written\n".to_owned(),
            (Ending::Failed, Stage::Hashing) => "instar: stopped while hashing the disk\n".to_owned(),
            (Ending::Failed, Stage::Emptying) => "instar: stopped while emptying the overlay\n".to_owned(),
        };
        (self.print)(&line);
    }
}

/// What fits into a line of a terminal; longer ones would fill the screen.
fn template(columns: Option<usize>) -> &'static str {
    match columns {
        Some(..40) => SHORTEST_TEMPLATE,
        Some(40..76) => SHORT_TEMPLATE,
        _ => TEMPLATE,
    }
}

/// Whether all bytes of a stage have moved, which is not over: the last byte counts when it is.
fn is_finishing(Progress { done, total, .. }: Progress) -> bool {
    total > 1 && done == total - 1
}

fn set_template(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
}

/// The answer to a signal.
#[must_use]
pub fn one_line(progress: Progress) -> String {
    match progress.stage {
        Stage::Checking => "instar: checking: nothing is changed yet\n".to_owned(),
        Stage::Writing if progress.total == 0 => "instar: writing: how much it is, is not known\n".to_owned(),
        Stage::Writing | Stage::Verifying | Stage::Hashing | Stage::Emptying | Stage::Reading => line(progress, ""),
    }
}

fn line(progress: Progress, pace: &str) -> String {
    let what = match progress.stage {
        Stage::Verifying => "reading back: ",
        Stage::Hashing => "hashing the disk: ",
        Stage::Emptying => "emptying the overlay: ",
        Stage::Checking | Stage::Writing | Stage::Reading => "",
    };
    let Progress { done, total, .. } = progress;
    if is_finishing(progress) {
        return format!("instar: {what}{} % (all {total} bytes have moved: finishing)\n", percent(progress));
    }
    format!("instar: {what}{} % ({}{pace})\n", percent(progress), amount(done, total))
}

/// How much of how much, exactly and with units.
fn amount(done: u64, total: u64) -> String {
    let exact = format!("{done} of {total} bytes");
    match total {
        0..1000 => exact,
        _ => format!("{exact}, {} of {}", format_size(done), format_size(total)),
    }
}

/// How fast a stage is, and how long it takes from now on: once there is something to go by.
fn pace(Progress { done, total, .. }: Progress, elapsed: Duration) -> String {
    let milliseconds = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    let rate = done.saturating_mul(1000) / milliseconds.max(1);
    if milliseconds < 1000 || rate == 0 {
        return String::new();
    }
    format!(", {}/s, {} s left", BinaryBytes(rate), total.saturating_sub(done).div_ceil(rate))
}

/// Rounded down.
fn percent(progress: Progress) -> u64 {
    let percent = (u128::from(progress.done) * 100).checked_div(u128::from(progress.total)).unwrap_or(0);
    u64::try_from(percent).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local!(static PRINTED: Cell<Vec<String>> = const { Cell::new(Vec::new()) });

    fn keep(text: &str) {
        PRINTED.set(PRINTED.take().into_iter().chain([text.trim_start_matches("instar: ").to_owned()]).collect());
    }

    fn shown(all: &[(Stage, u64, u64)], ending: Ending) -> Vec<String> {
        let mut shown = Shown::with(None, keep);
        all.iter().for_each(|&(stage, done, total)| shown.show(Progress { stage, done, total }));
        shown.end(ending);
        PRINTED.take()
    }

    #[test]
    fn a_line_for_each_percent_rounded_down() {
        use Stage::{Checking, Emptying, Writing};
        let all = [
            (Checking, 0, 0),
            (Writing, 0, 1600),
            (Writing, 300, 1600),
            (Writing, 301, 1600),
            (Writing, 1599, 1600),
            (Writing, 1600, 1600),
            (Emptying, 0, 1000),
            (Emptying, 500, 1000),
            (Emptying, 1000, 1000),
        ];
        let lines = [
            "18 % (300 of 1600 bytes, 300 B of 1.56 KiB)\n",
            "99 % (all 1600 bytes have moved: finishing)\n",
            "100 % (1600 of 1600 bytes, 1.56 KiB of 1.56 KiB)\n",
            "emptying the overlay\n",
            "emptying the overlay: 50 % (500 of 1000 bytes, 500 B of 0.98 KiB)\n",
            "emptying the overlay: 100 % (1000 of 1000 bytes, 0.98 KiB of 0.98 KiB)\n",
            "done\n",
        ];
        assert_eq!(shown(&all, Ending::Done), lines);
    }

    #[test]
    fn a_stage_that_takes_long_has_a_rate() {
        let progress = Progress { stage: Stage::Writing, done: 3 << 20, total: 10 << 20 };
        assert_eq!(pace(progress, Duration::from_millis(999)), "");
        assert_eq!(pace(progress, Duration::from_secs(2)), ", 1.50 MiB/s, 5 s left");
        assert_eq!(pace(Progress { done: 0, ..progress }, Duration::from_secs(2)), "");
        assert_eq!(one_line(progress), "instar: 30 % (3145728 of 10485760 bytes, 3 MiB of 10 MiB)\n");
        assert_eq!(
            one_line(Progress { stage: Stage::Checking, ..progress }),
            "instar: checking: nothing is changed yet\n"
        );
    }

    #[test]
    fn a_stage_whose_bytes_have_all_moved_promises_no_time() {
        use Stage::Writing;
        let lines = [
            "99 % (1597 of 1600 bytes, 1.56 KiB of 1.56 KiB)\n",
            "99 % (all 1600 bytes have moved: finishing)\n",
            "stopped at 99 % (1599 of 1600 bytes, 1.56 KiB of 1.56 KiB)\n",
        ];
        let all = [(Writing, 0, 1600), (Writing, 1597, 1600), (Writing, 1599, 1600), (Writing, 1599, 1600)];
        assert_eq!(shown(&all, Ending::Failed), lines);
        assert_eq!(
            one_line(Progress { stage: Writing, done: 1599, total: 1600 }),
            "instar: 99 % (all 1600 bytes have moved: finishing)\n"
        );
    }

    #[test]
    fn the_last_line_says_how_it_ended() {
        use Stage::{Checking, Emptying, Writing};
        assert_eq!(shown(&[(Checking, 0, 0)], Ending::Failed), [""; 0]);
        assert_eq!(shown(&[(Writing, 0, 100)], Ending::Failed), ["stopped at 0 % (0 of 100 bytes)\n"]);
        assert_eq!(shown(&[(Writing, 0, 100)], Ending::DryRun), ["done: a dry run writes nothing\n"]);
        assert_eq!(shown(&[(Writing, 0, 0)], Ending::Done), ["done\n"], "nothing of nothing is no percentage");
        let emptying = shown(&[(Emptying, 0, 100)], Ending::Failed);
        assert_eq!(emptying, ["emptying the overlay\n", "stopped while emptying the overlay\n"]);
    }
}
