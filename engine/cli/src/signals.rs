//! Signals. SIGINT, SIGTERM and SIGHUP: the guest is ended between two requests, where the files are consistent. SIGUSR1: somebody
//! wants to know how far the command is.

use instar::operation::Cancel;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

static CANCEL: OnceLock<Cancel> = OnceLock::new();

extern "C" fn cancel(_: libc::c_int) {
    // It was set before the handler was installed: this only loads it, and stores to an atomic.
    if let Some(operation) = CANCEL.get() {
        operation.cancel();
    }
}

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn ask(_: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Whether a SIGUSR1 has come that nobody has answered.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// The same, and from now on it counts as answered.
pub fn answers() -> bool {
    asked() && ASKED.swap(false, Ordering::Relaxed)
}

/// From now on, SIGUSR1 is a question ([`asked`]) instead of the end of the process, unless the process was started to ignore it.
pub fn answer_sigusr1() {
    // SAFETY: `action` and `old` are valid sigactions; the handler only stores to an atomic.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGUSR1, std::ptr::null(), &raw mut old) != 0 || old.sa_sigaction == libc::SIG_IGN {
            return;
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ask as extern "C" fn(libc::c_int) as usize;
        // A question interrupts nothing.
        action.sa_flags = libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
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
