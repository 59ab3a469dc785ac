//! What a commit has changed when it ends.

use crate::devices::Devices;
use instar_guest_abi::Phase;

/// The files that the guest changed, according to the devices and not to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Whether a child of the overlay was changed, which means that the commit is done.
    pub children: bool,
    /// Whether the overlay was changed, which means that the backing is complete.
    pub overlay: bool,
    /// Whether the backing was changed, or the record of its coming identity.
    pub backing: bool,
}

impl Changed {
    /// The state of these devices.
    #[must_use]
    pub fn of(devices: &Devices) -> Self {
        let changed = devices.any_changed();
        let in_phase = |phase| changed && devices.phase() == phase;
        Self { children: in_phase(Phase::Children), overlay: in_phase(Phase::Overlay), backing: changed }
    }

    /// The state of the files in one clause.
    pub const fn clause(self) -> &'static str {
        match (self.overlay, self.backing) {
            _ if self.children => {
                "the commit is done, and every child names the overlay or the target and reads as before; running the same \
                 command again relinks the rest"
            }
            (true, _) => "the backing is complete and the overlay reads as before; running the commit again empties it",
            (false, true) => "the overlay is intact, and running the commit again finishes it",
            (false, false) => "nothing was changed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_says_what_to_do() {
        let clause = |overlay, backing| Changed { children: false, overlay, backing }.clause();
        assert!(clause(false, false).contains("nothing was changed"));
        assert!(clause(false, true).contains("overlay is intact") && clause(false, true).contains("again finishes"));
        assert!(clause(true, true).contains("backing is complete"));
        let children = Changed { children: true, overlay: false, backing: true };
        assert!(children.clause().contains("commit is done") && children.clause().contains("again relinks"));
    }
}
