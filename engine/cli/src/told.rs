//! Who is told on stderr what an operation does.

use super::output::render_warning;
use super::progress::{one_line, Ending, Shown};
use super::progress_args::ProgressArgs;
use super::progress_lines::Lines;
use super::said::{broken, say_note};
use super::signals::{answer_sigusr1, answers, asked};
use super::terminal::say;
use instar::error::Error;
use instar::operation::{Cancel, Observer, Progress, Session};
use serde::Serialize;
use std::cell::RefCell;
use std::rc::Rc;

/// Prints what is wanted of it. By default, nothing is.
#[derive(Debug, Default)]
pub struct Told {
    /// Print notes.
    pub verbose: bool,
    /// Print warnings.
    pub warns: bool,
    /// Shows people how far the operation is.
    pub shown: Option<RefCell<Shown>>,
    /// Tells programs.
    pub lines: Option<RefCell<Lines>>,
}

impl Told {
    /// Make the observers of the command `job`'s progress. Signals are answered in any case.
    ///
    /// # Errors
    /// A descriptor that nothing can be written to.
    pub fn of(job: &'static str, progress: &ProgressArgs, quiet: bool) -> Result<Self, Error> {
        answer_sigusr1();
        let (shown, lines) = (progress.shown(quiet), progress.lines(job)?);
        Ok(Self { shown: shown.map(RefCell::new), lines: lines.map(RefCell::new), ..Self::default() })
    }

    /// The session of a command that is confined, and that `cancel` ends.
    pub fn session(self: &Rc<Self>, cancel: Cancel) -> Session {
        let session = Session::confined(self.clone(), cancel);
        match &self.lines {
            Some(lines) => session.printing_on(lines.borrow().descriptor()),
            None => session,
        }
    }

    /// The operation, which in a `dry_run` was to change nothing, is over with this result: what `--output json` prints of it.
    pub fn end(&self, dry_run: bool, result: Result<&impl Serialize, &Error>) {
        let ending = match result {
            Ok(_) if dry_run => Ending::DryRun,
            Ok(_) => Ending::Done,
            Err(_) => Ending::Failed,
        };
        self.shown.iter().for_each(|shown| shown.borrow_mut().end(ending));
        self.lines.iter().for_each(|lines| lines.borrow().conclude(result));
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
        match &self.lines {
            _ if !self.warns => {}
            Some(lines) if lines.borrow().on_standard_error() => lines.borrow().warn(line),
            _ => self.aside(&broken(&render_warning(line))),
        }
    }

    fn wants_progress(&self) -> bool {
        self.shown.is_some() || self.lines.is_some()
    }

    fn asks_for_progress(&self) -> bool {
        asked()
    }

    fn progress(&self, progress: Progress) {
        let asked = answers();
        match &self.lines {
            Some(lines) => lines.borrow_mut().show(progress, asked),
            None if asked => self.aside(&one_line(progress)),
            None => {}
        }
        self.shown.iter().for_each(|shown| shown.borrow_mut().show(progress));
    }
}

impl Told {
    /// Whether the findings of a check are lines of progress, since those are all that standard error has.
    pub fn findings_are_lines(&self) -> bool {
        self.lines.as_ref().is_some_and(|lines| lines.borrow().on_standard_error())
    }

    /// Tell programs the findings, a line each.
    pub fn findings(&self, text: &str) {
        self.lines.iter().for_each(|lines| text.lines().for_each(|line| lines.borrow().find(line)));
    }

    /// Say a line, above the bar if there is one.
    fn aside(&self, line: &str) {
        match &self.shown {
            Some(shown) => shown.borrow().aside(line),
            None => say(line),
        }
    }
}
