//! Host and guest take turns: while one works, the other waits. On two processors each turn would begin with waking one that
//! sleeps, which takes longer than most turns do. So both are kept on the same one.
//!
//! That one may turn out to be busy with something else while others have nothing to do. Every now and then the host is let go
//! for one turn: the kernel puts it where there is room when the guest wakes it, and both stay there.

use rustix::thread::{sched_getaffinity, sched_getcpu, sched_setaffinity, CpuSet, Pid};
use std::time::{Duration, Instant};

/// How long both stay where they are.
const STAY: Duration = Duration::from_millis(20);

/// Keeps this thread and the guest's process on one processor, as long as it lives. What the kernel does not allow only costs
/// time.
pub struct Turns {
    guest: Option<Pid>,
    /// The processors that this thread may use, if there is a choice.
    own: Option<CpuSet>,
    since: Instant,
    is_free: bool,
}

impl Turns {
    /// Begin, with a guest that mostly waits by now.
    pub fn begin(guest: libc::pid_t) -> Self {
        let own = sched_getaffinity(None).ok().filter(|own| own.count() > 1);
        let mut turns = Self { guest: Pid::from_raw(guest), own, since: Instant::now(), is_free: false };
        turns.hold();
        turns
    }

    /// It is the host's turn.
    pub fn next(&mut self) {
        let Some(own) = &self.own else { return };
        if self.is_free {
            self.hold();
        } else if self.since.elapsed() > STAY {
            self.is_free = sched_setaffinity(None, own).is_ok();
        }
    }

    /// Both stay where the host is.
    fn hold(&mut self) {
        let Some(own) = &self.own else { return };
        let mut here = CpuSet::new();
        let processor = sched_getcpu();
        // Where they are not counted as they are numbered, it is better to do nothing.
        if processor < CpuSet::MAX_CPU && own.is_set(processor) {
            here.set(processor);
            let _ = self.guest.map(|guest| sched_setaffinity(Some(guest), &here));
            let _ = sched_setaffinity(None, &here);
        }
        (self.since, self.is_free) = (Instant::now(), false);
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        if let Some(own) = &self.own {
            let _ = sched_setaffinity(None, own);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sets(guest: Option<Pid>) -> [CpuSet; 2] {
        [sched_getaffinity(None).unwrap(), sched_getaffinity(guest).unwrap()]
    }

    #[test]
    fn both_are_on_one_processor_and_are_let_go() {
        let own = sched_getaffinity(None).unwrap();
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let number = libc::pid_t::try_from(sleeper.id()).unwrap();
        let mut turns = Turns::begin(number);
        let guest = turns.guest;
        if own.count() > 1 {
            assert!(sets(guest).iter().all(|set| set.count() == 1));
            turns.since = Instant::now().checked_sub(2 * STAY).unwrap();
            turns.next();
            assert_eq!(sets(guest).map(|set| set.count()), [own.count(), 1], "the host has a free turn");
            turns.next();
            let [host, guest] = sets(guest);
            assert!(host == guest && host.count() == 1);
            turns.next();
            assert_eq!(sets(turns.guest)[0].count(), 1, "not yet again");
        }
        drop(turns);
        assert!(sets(guest)[0] == own);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
    }
}
