//! The limit of open files of the process.

use instar_guest_abi::{MAX_CHAIN_DEVICES, MAX_FILE_DEVICES};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

/// Files besides those of a chain: plugins, KVM, the standard streams, directories on the way.
const OTHERS: u64 = 256;

/// As many as the longest chain needs, and a new image in as many files as there can be, each of which is open twice.
const fn needed() -> u64 {
    (MAX_CHAIN_DEVICES + 2 * MAX_FILE_DEVICES) as u64 + OTHERS
}

/// Raise the limit of open files to the needs of the longest chain, as far as the hard limit allows. The usual soft limit is
/// 1024. If it cannot be raised, the first open beyond it reports so.
pub fn allow_many() {
    let needed = needed();
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < needed) {
        let raised = maximum.map_or(needed, |maximum| needed.min(maximum));
        // Nothing is lost if it fails.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_goes_up_to_the_hard_one_at_most() {
        allow_many();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let needed = needed();
        assert!(current.is_none_or(|current| current >= needed || Some(current) == maximum));
    }
}
