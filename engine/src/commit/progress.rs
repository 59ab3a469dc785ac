//! `-p`: how far a commit is, on stderr: a bar on a terminal, lines elsewhere.

use crate::devices::Watch;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::RefCell;
use std::io::IsTerminal;
use std::rc::Rc;

/// Bar, percentage, bytes, rate, time left.
const TEMPLATE: &str = "{msg} [{bar:30}] {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta} left";

/// How far it is, and how that is shown.
#[derive(Debug)]
struct State {
    total: u64,
    moved: u64,
    /// Tenths of the whole that were shown as lines.
    tenths: u64,
    bar: Option<ProgressBar>,
}

/// Shows progress; clones show the same.
#[derive(Clone, Debug)]
pub struct Progress(Rc<RefCell<State>>);

impl Progress {
    /// Nothing is shown before it is known how much there is.
    #[must_use]
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message("committing");
            bar
        });
        Self(Rc::new(RefCell::new(State { total: 0, moved: 0, tenths: 0, bar })))
    }

    /// So many guest bytes are to be committed.
    pub fn planned(&self, total: u64) {
        let mut state = self.0.borrow_mut();
        state.total = total;
        if let Some(bar) = &state.bar {
            bar.set_length(total);
            bar.reset_eta();
        }
    }

    /// The data is there: the overlay is emptied.
    pub fn emptying(&self) {
        let mut state = self.0.borrow_mut();
        state.move_to(u64::MAX);
        match &state.bar {
            Some(bar) => bar.set_message("emptying the overlay"),
            None => eprintln!("instar: emptying the overlay"),
        }
    }

    /// It is over: well, or not.
    pub fn end(&self, well: bool) {
        let mut state = self.0.borrow_mut();
        if well {
            state.move_to(u64::MAX);
        }
        if let Some(bar) = state.bar.take() {
            if well {
                bar.set_message("committed");
                bar.finish();
            } else {
                // The message of the error takes its place.
                bar.finish_and_clear();
            }
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// So much has moved; metadata counts little, and the whole is never exceeded.
    fn move_to(&mut self, moved: u64) {
        self.moved = moved.min(self.total);
        if let Some(bar) = &self.bar {
            bar.set_position(self.moved);
            return;
        }
        let tenths = if self.total == 0 { 10 } else { u128::from(self.moved) * 10 / u128::from(self.total) };
        let tenths = u64::try_from(tenths).unwrap_or(10);
        if tenths > self.tenths {
            self.tenths = tenths;
            eprintln!("instar: {} % ({} of {} bytes)", tenths * 10, self.moved, self.total);
        }
    }
}

impl Watch for Progress {
    fn moved(&mut self, bytes: u64) {
        let mut state = self.0.borrow_mut();
        let moved = state.moved.saturating_add(bytes);
        if state.total > 0 {
            state.move_to(moved);
        }
    }
}
