//! The state of the files when a commit ends early, seen from what was done to them rather than from what the guest says.

use crate::devices::DeviceSet;
use instar_guest_abi::DEVICE_OUTPUT;

/// Which files were changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The backing was.
    pub backing: bool,
    /// The overlay was: emptying had begun, so the backing was complete.
    pub overlay: bool,
}

impl Changed {
    /// From what was done to the devices.
    #[must_use]
    pub fn of(devices: &DeviceSet) -> Self {
        let changed = |number| devices.get(number).is_some_and(crate::devices::Device::is_changed);
        Self { backing: changed(DEVICE_OUTPUT), overlay: changed(0) }
    }

    /// One clause for people.
    #[must_use]
    pub const fn clause(self) -> &'static str {
        match (self.overlay, self.backing) {
            (false, false) => "nothing was changed",
            (false, true) => {
                "the overlay is intact and reads as before, the backing is partly written; running the commit again \
                 finishes it"
            }
            (true, _) => {
                "the backing is complete and the overlay reads as before, but is only partly emptied; running the commit \
                 again finishes it"
            }
        }
    }
}
