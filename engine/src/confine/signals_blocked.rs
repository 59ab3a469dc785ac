//! Threads that take no signals.

/// While it lives, the calling thread, and those that it starts for good, take no signals: those are for the thread that is
/// in the virtual machine, which has to come out.
pub(crate) struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    /// Block them.
    pub(crate) fn new() -> Self {
        // SAFETY: all-zero is a valid value of the C structure, and both sets live as long as the calls.
        unsafe {
            let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            // If it were blocked, the kernel would kill the process silently.
            libc::sigdelset(&raw mut all, libc::SIGSYS);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by the call in `new`.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}
