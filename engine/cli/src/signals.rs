//! Signals. SIGINT, SIGTERM and SIGHUP: the guest is ended between two requests, where the files are consistent.

use instar::operation::Cancel;
use std::sync::OnceLock;

static CANCEL: OnceLock<Cancel> = OnceLock::new();

extern "C" fn cancel(_: libc::c_int) {
    // It was set before the handler was installed: this only loads it, and stores to an atomic.
    if let Some(operation) = CANCEL.get() {
        operation.cancel();
    }
}

/// From now on, the first SIGINT, SIGTERM or SIGHUP of each kind cancels the operation; a second one ends the process at once. What the
/// process was started to ignore stays ignored. Long system calls return, so that this is seen. A file that exceeds
/// a limit of the process (`ulimit -f`) is an error with a sentence, not the end.
#[must_use]
pub fn cancel_on_signals() -> Cancel {
    let operation = CANCEL.get_or_init(Cancel::new).clone();
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: `action` and `old` are valid sigactions; the handler does only what a signal handler may.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, std::ptr::null(), &raw mut old) != 0 || old.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = cancel as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESETHAND;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
    operation
}
