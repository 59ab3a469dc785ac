//! The ways to open an image.

use rustix::fs::OFlags;

/// The ways to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be changed.
    ReadWrite,
    /// Only to be read.
    ReadOnly,
    /// For reading without a lock, even while another process writes to it.
    Shared,
}

impl Access {
    /// That of a command that only reads; `shared`: also what something else is writing to.
    #[must_use]
    pub fn to_read(shared: bool) -> Self {
        if shared {
            Self::Shared
        } else {
            Self::ReadOnly
        }
    }

    /// Only files and block devices are opened. One that another took the place of meanwhile must neither block nor become
    /// the terminal of the process.
    pub(super) fn flags(self) -> OFlags {
        let mode = match self {
            Self::ReadWrite => OFlags::RDWR,
            Self::ReadOnly | Self::Shared => OFlags::RDONLY,
        };
        mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
    }
}
