//! Signals. SIGINT, SIGTERM and SIGHUP: the guest is ended between two requests, where the files are consistent.

use std::sync::atomic::{AtomicBool, Ordering};

static RECEIVED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    RECEIVED.store(true, Ordering::Relaxed);
}

/// From now on, the first SIGINT, SIGTERM or SIGHUP of each kind is noted; a second one ends the process at once. What the
/// process was started to ignore stays ignored. Long system calls return, so that the note is seen. A file that exceeds
/// a limit of the process (`ulimit -f`) is an error with a sentence, not the end.
pub fn install() {
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: `action` and `old` are valid sigactions; the handler only stores to an atomic.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, std::ptr::null(), &raw mut old) != 0 || old.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESETHAND;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// Whether one of them came.
#[must_use]
pub fn received() -> bool {
    RECEIVED.load(Ordering::Relaxed)
}
