//! Interrupting a guest that does not return by itself.
//!
//! A periodic timer sends this thread a signal while it is in the guest; `KVM_RUN` then returns with EINTR. What
//! counts is the processor time that the guest consumed, so that neither a busy machine nor a slow disk nor a suspended
//! process looks like a stall.

use crate::sandbox::error::SandboxError;
use std::mem::{zeroed, MaybeUninit};
use std::ptr::null_mut;
use std::time::Duration;

/// Added to `SIGRTMIN`: away from the first ones, which others take.
const SIGNAL_OFFSET: i32 = 6;

/// The timer, and the processor time that the guest has used.
#[derive(Debug)]
pub struct Watchdog {
    timer: libc::timer_t,
    tick: Duration,
    used: Duration,
    entered: Duration,
}

/// Nothing to do: being called is what interrupts `KVM_RUN`.
extern "C" fn on_signal(_: libc::c_int) {}

fn last_error(what: &str) -> SandboxError {
    SandboxError::unusable(what, std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

impl Watchdog {
    /// A watchdog for the calling thread, which lets it out several times within this limit.
    ///
    /// # Errors
    /// [`SandboxError::KvmUnusable`] when there is no timer to be had.
    pub fn new(limit: Duration) -> Result<Self, SandboxError> {
        let signal = libc::SIGRTMIN() + SIGNAL_OFFSET;
        // SAFETY: all-zero is a valid value of these C structures; the handler does nothing, so it is safe at any
        // moment, and system calls of other threads restart.
        unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            if libc::sigaction(signal, &raw const action, null_mut()) != 0 {
                return Err(last_error("sigaction"));
            }
            let mut set: libc::sigset_t = zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, null_mut());
        }
        let mut timer = MaybeUninit::uninit();
        // SAFETY: all-zero is a valid value of the structure; `timer` is writable.
        let created = unsafe {
            let mut event: libc::sigevent = zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, timer.as_mut_ptr())
        };
        if created != 0 {
            return Err(last_error("timer_create"));
        }
        // SAFETY: `timer_create` succeeded, so it wrote the timer.
        let timer = unsafe { timer.assume_init() };
        let tick = (limit / 8).clamp(Duration::from_millis(10), Duration::from_millis(250));
        Ok(Self { timer, tick, used: Duration::ZERO, entered: Duration::ZERO })
    }

    fn set(&self, period: Duration) {
        let period = libc::timespec { tv_sec: 0, tv_nsec: libc::c_long::from(period.subsec_nanos()) };
        let value = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: the timer is ours and lives until `drop`. It cannot fail with these values.
        unsafe { libc::timer_settime(self.timer, 0, &raw const value, null_mut()) };
    }

    /// The thread is about to enter the guest.
    pub fn enter(&mut self) {
        self.set(self.tick);
        self.entered = thread_time();
    }

    /// The thread is out of the guest.
    pub fn leave(&mut self) {
        // Not armed outside the guest: a signal would interrupt system calls that do not restart.
        self.set(Duration::ZERO);
        self.used += thread_time().saturating_sub(self.entered);
    }

    /// The processor time that the guest has used.
    pub fn used(&self) -> Duration {
        self.used
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and is not used any more.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// Processor time of this thread, that of its guests included.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Instant;

    fn spin(time: Duration) {
        let start = thread_time();
        while thread_time() - start < time {}
    }

    #[test]
    fn only_processor_time_counts() {
        let mut watchdog = Watchdog::new(Duration::from_millis(40)).unwrap();
        watchdog.enter();
        std::thread::sleep(Duration::from_millis(80));
        watchdog.leave();
        assert!(watchdog.used() < Duration::from_millis(20), "sleeping is not running");
        for _ in 0..3 {
            watchdog.enter();
            spin(Duration::from_millis(20));
            watchdog.leave();
            spin(Duration::from_millis(20));
        }
        let used = watchdog.used();
        assert!((Duration::from_millis(60)..Duration::from_millis(100)).contains(&used), "{used:?}");
    }

    #[test]
    fn the_timer_interrupts_a_system_call() {
        let mut watchdog = Watchdog::new(Duration::from_millis(100)).unwrap();
        let start = Instant::now();
        watchdog.enter();
        let time = libc::timespec { tv_sec: 5, tv_nsec: 0 };
        // SAFETY: a valid time, and no remainder is asked for.
        let result = unsafe { libc::nanosleep(&raw const time, null_mut()) };
        watchdog.leave();
        assert_eq!(result, -1);
        assert!(start.elapsed() < Duration::from_secs(4));
    }
}
