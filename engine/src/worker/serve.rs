//! The worker's side: it reads one request from a file and writes all events to another one.

use super::wire;
use crate::cancel::Cancel;
use crate::commit::run_commit;
use crate::error::Error;
use crate::operation::{Observer, Progress, Session};
use instar_guest_abi::ErrorCode;
use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::rc::Rc;

/// Longest request in bytes: some names, and as many directories as a command line can have.
const REQUEST_MAX: u64 = 16 << 20;

/// Tells the caller what happens. What cannot be told is lost: the operation goes on, as with every line on a terminal.
struct Tells<W> {
    out: RefCell<W>,
    notes: bool,
    progress: bool,
}

impl<W: Write> Tells<W> {
    fn tell(&self, event: &[u8]) {
        let mut out = self.out.borrow_mut();
        let _ = out.write_all(event).and_then(|()| out.flush());
    }
}

impl<W: Write> Observer for Tells<W> {
    fn wants_notes(&self) -> bool {
        self.notes
    }

    fn note(&self, line: &str) {
        self.tell(&wire::note(line));
    }

    fn warning(&self, line: &str) {
        self.tell(&wire::warning(line));
    }

    fn wants_progress(&self) -> bool {
        self.progress
    }

    fn progress(&self, progress: Progress) {
        if self.progress {
            self.tell(&wire::progress(progress));
        }
    }
}

/// Do what is asked for in `input`, and tell it on `out`. The process is [confined](crate::confine) by it, for good.
///
/// # Errors
/// A request that makes no sense.
pub fn serve(input: File, out: impl Write + 'static, cancel: Cancel) -> Result<(), Error> {
    let mut bytes = Vec::new();
    let read = input.take(REQUEST_MAX).read_to_end(&mut bytes);
    let request = read.ok().and_then(|_| wire::parse(&bytes));
    let Some((request, notes, progress)) = request else {
        let text = "a worker is started by a program that uses the library, and was told nothing that makes sense";
        return Err(Error::new(ErrorCode::BadUsage, text));
    };
    let tells = Rc::new(Tells { out: RefCell::new(out), notes, progress });
    let result = run_commit(&request, &Session::confined(tells.clone(), cancel));
    tells.tell(&wire::answer(&result));
    Ok(())
}
