//! SIGINT and SIGTERM: the guest is ended between two requests, where the files are consistent.

use std::sync::atomic::{AtomicBool, Ordering};

static RECEIVED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    RECEIVED.store(true, Ordering::Relaxed);
}

/// From now on, SIGINT and SIGTERM are noted instead of ending the process. A second one has the same effect.
pub fn install() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: `action` is a valid sigaction whose handler only stores to an atomic.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
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
