//! What a guest may change, and when.

/// What a guest may change now. The host holds it to that: phases only go forward, and a request that changes what is not
/// open yet ends the guest before a byte is written.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing. Every operation begins so, and one that only reads, or a dry run, never leaves it.
    #[default]
    Inspect = 1,
    /// The image that is written, once the plan has been accepted. While it has no change that is not durable, that is before
    /// the first and after the last, a few bytes of the image above it may be replaced: those that record which parent it has.
    Target = 2,
    /// The image that is emptied, and nothing else, once everything that was written is durable.
    Overlay = 3,
    /// The images that get another parent, once that parent holds durably what they are to find there.
    Children = 4,
}

impl Phase {
    /// Whether `next` may follow this phase: they only go forward, and nothing is changed before a plan was accepted. An image
    /// that is emptied is not part of every operation.
    #[must_use]
    pub const fn leads_to(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Inspect, Self::Target)
                | (Self::Target, Self::Overlay)
                | (Self::Target | Self::Overlay, Self::Children)
        )
    }

    /// The phase with this number, if there is one.
    #[must_use]
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Inspect,
            2 => Self::Target,
            3 => Self::Overlay,
            4 => Self::Children,
            _ => return None,
        })
    }
}

/// Size in bytes of the one aligned range of a device that may be changed to record a parent.
pub const IDENTITY_RANGE: u64 = 4096;

/// By how many bytes an image's file may become longer when it gets another parent.
pub const PARENT_ROOM: u64 = 256 << 10;

/// What a device is to the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRole {
    /// It is only read.
    Read,
    /// Data goes into it.
    Target,
    /// Data goes into it, as into a target, and afterwards, once that is durable, it gets another parent.
    Rebased,
    /// It is above the target.
    Overlay {
        /// It is emptied at the end.
        emptied: bool,
        /// It may record that the target changes, before it does.
        identity: bool,
    },
    /// It gets another parent.
    Child,
}

/// What is the case when a device is about to be changed.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// The phase.
    pub phase: Phase,
    /// A device of the target has changes that are not flushed.
    pub target_unflushed: bool,
    /// The record of a parent was changed, and is not flushed.
    pub record_unflushed: bool,
    /// The change is a write that lies where the record of a parent may be.
    pub is_record: bool,
}

impl DeviceRole {
    /// Why a device may not be changed now, in one clause; nothing if it may.
    #[must_use]
    pub const fn refusal(self, now: Situation) -> Option<&'static str> {
        match (self, now.phase) {
            (Self::Read | Self::Overlay { emptied: false, identity: false }, _) => {
                Some("a change of a device that is read-only")
            }
            (Self::Target | Self::Rebased | Self::Overlay { .. } | Self::Child, Phase::Inspect) => {
                Some("a change before a plan was accepted")
            }
            // A crash in between must not leave a target that the image above it does not know.
            (Self::Target, Phase::Target) if now.record_unflushed => {
                Some("a change of the target before the record of its parent is flushed")
            }
            (Self::Target, Phase::Overlay | Phase::Children) => {
                Some("a change of the target after it was said to be complete")
            }
            (Self::Child, Phase::Target | Phase::Overlay) => {
                Some("another parent for an image before that parent is complete")
            }
            (Self::Overlay { .. }, Phase::Children) => Some("a change of the overlay after it was said to be complete"),
            (Self::Overlay { identity, .. }, Phase::Target) if !identity || now.target_unflushed || !now.is_record => {
                Some("a change of the overlay before the target is complete, which is no record of its parent")
            }
            (Self::Overlay { emptied: false, .. }, Phase::Overlay) => {
                Some("a change of an overlay that is to stay as it is")
            }
            _ => None,
        }
    }
}
