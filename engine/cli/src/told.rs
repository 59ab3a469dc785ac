//! Who is told on stderr what an operation does.

use super::output::render_warning;
use super::progress::{Ending, Shown};
use super::say_note;
use super::terminal::say;
use instar::operation::{Observer, Progress};
use std::cell::RefCell;

/// Prints what is wanted of it. By default, nothing is.
#[derive(Debug, Default)]
pub struct Told {
    /// Print notes.
    pub verbose: bool,
    /// Print warnings.
    pub warns: bool,
    /// Shows progress.
    pub shown: Option<RefCell<Shown>>,
}

impl Told {
    /// The operation is over.
    pub fn end(&self, ending: Ending) {
        self.shown.iter().for_each(|shown| shown.borrow_mut().end(ending));
    }
}

impl Observer for Told {
    fn wants_notes(&self) -> bool {
        self.verbose
    }

    fn note(&self, line: &str) {
        say_note(line);
    }

    fn warning(&self, line: &str) {
        if self.warns {
            say(&render_warning(line));
        }
    }

    fn wants_progress(&self) -> bool {
        self.shown.is_some()
    }

    fn progress(&self, progress: Progress) {
        self.shown.iter().for_each(|shown| shown.borrow_mut().show(progress));
    }
}
