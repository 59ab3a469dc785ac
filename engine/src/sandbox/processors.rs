//! How many processors a guest gets.

use instar_guest_abi::MAX_WORKERS;
use rustix::thread::sched_getaffinity;

/// How many workers pay off beside the main processor, where the caller wants `most` processors at most: one for each further
/// processor that this process may use.
#[must_use]
pub fn workers(most: usize) -> usize {
    let here = sched_getaffinity(None).map_or(1, |set| usize::try_from(set.count()).unwrap_or(1));
    here.min(most).saturating_sub(1).min(MAX_WORKERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_processor_has_no_workers() {
        assert_eq!((workers(0), workers(1)), (0, 0));
        assert!(workers(usize::MAX) <= MAX_WORKERS);
    }
}
