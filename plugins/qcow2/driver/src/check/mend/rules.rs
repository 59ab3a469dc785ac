//! What refcounts and COPIED flags become when an image is mended.

use crate::image::Image;
use instar_guest_sdk::abi::Repair;
use instar_qcow2_format::{autoclear, ExtensionKind};

/// What refcounts and flags become.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Refcounts that are too low are raised, and all flags corrected.
    pub(super) all: bool,
    /// The largest refcount.
    max: u64,
    /// Clusters that no table names may belong to what this program does not know: they keep their refcount.
    keeps: bool,
}

impl Rules {
    pub(super) fn of(image: &Image, what: Repair) -> Self {
        let stale = image.header.autoclear & autoclear::BITMAPS == 0;
        let owns = |kind: ExtensionKind| match kind {
            ExtensionKind::Unknown(_) => true,
            ExtensionKind::Bitmaps => stale,
            _ => false,
        };
        let keeps = image.header.extensions.iter().any(|extension| owns(extension.kind));
        Self { all: what == Repair::All, max: image.header.refcount_order.max(), keeps }
    }

    /// The same, and clusters that no table names keep their refcount.
    pub(super) const fn keeping(self) -> Self {
        Self { keeps: true, ..self }
    }

    /// A refcount before those that are too high are lowered.
    pub(super) fn raised(self, refcount: u64, references: u64) -> u64 {
        let can = self.all && references <= self.max;
        if can {
            refcount.max(references)
        } else {
            refcount
        }
    }

    /// A refcount in the end.
    pub(super) fn ended(self, refcount: u64, references: u64) -> u64 {
        let raised = self.raised(refcount, references);
        if references == 0 && self.keeps {
            raised
        } else {
            raised.min(references)
        }
    }

    /// The COPIED flag of an entry: set exactly if the refcount of what it refers to is 1 in the end.
    pub(super) fn copied(self, now: bool, refcount: u64, references: u64) -> bool {
        let follows = self.ended(refcount, references) == references && (self.all || refcount > references);
        if follows {
            references == 1
        } else {
            now
        }
    }
}
