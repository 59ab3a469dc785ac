//! What is to be done with a cluster of a backing.

use crate::image::Image;
use crate::metadata::l2_entry::Mapped;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::{Fill, Old};
use crate::write::subclusters::{subcluster_change, Place, SubclusterChange};
use instar_qcow2_format::{incompatible, HostOffset, L2Entry, Version};

/// What is to be done with a cluster of the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// It reads as it should already.
    Nothing,
    /// Write into the cluster that is there.
    InPlace(HostOffset),
    /// Write into the cluster that is kept for a zero cluster: its stale bytes must go, then its zero flag.
    Revive(HostOffset),
    /// Allocate a cluster, and drop one reference to what was there.
    Allocate(Fill, Old),
    /// Make it a zero cluster (or an unallocated one, if `false`), and drop one reference to what was there.
    MakeZero(bool, Old),
    /// All of the above, for each subcluster.
    Subclusters(SubclusterChange),
}

impl Action {
    /// Whether it takes a new cluster.
    pub(crate) fn allocates(&self) -> bool {
        matches!(self, Self::Allocate(..) | Self::Subclusters(SubclusterChange { place: Place::New, .. }))
    }

    /// Whether the L2 entry changes.
    pub(crate) fn remaps(&self) -> bool {
        match self {
            Self::Nothing | Self::InPlace(_) => false,
            Self::Revive(_) | Self::Allocate(..) | Self::MakeZero(..) => true,
            Self::Subclusters(change) => change.remaps(),
        }
    }

    /// The compressed cluster that has to be decoded for it.
    pub(crate) fn decodes(&self) -> Option<u64> {
        match *self {
            Self::Allocate(Fill::Compressed(descriptor), _)
            | Self::Subclusters(SubclusterChange { fill: Fill::Compressed(descriptor), .. }) => Some(descriptor),
            _ => None,
        }
    }
}

/// What is to be done with a cluster, given its entry and the parts of extents that fall into it. `has_backing` tells whether there is
/// anything below the image.
pub(crate) fn action(image: &Image, has_backing: bool, extents: &[ClusterExtent], mapped: &Mapped) -> Action {
    let Some(first) = extents.first() else {
        return Action::Nothing;
    };
    let entry = mapped.entry;
    if image.header.has(incompatible::EXTENDED_L2) {
        return subcluster_change(image, has_backing, extents, mapped).map_or(Action::Nothing, Action::Subclusters);
    }
    let all_zero = extents.iter().all(ClusterExtent::is_zero);
    let covered: u64 = extents.iter().map(|extent| extent.length).sum();
    let whole = covered >= image.visible_bytes(first.cluster);
    let zero_flag = image.header.version == Version::V3;
    // A zero cluster can be had without writing zeroes: by the flag, or by falling through to nothing.
    let can_be_zero = all_zero && whole && (zero_flag || !has_backing);
    match entry {
        L2Entry::Data { offset, .. } if can_be_zero => Action::MakeZero(zero_flag, Old::Cluster(offset)),
        L2Entry::Data { offset, copied: true } => Action::InPlace(offset),
        // Shared with a snapshot: copy on write.
        L2Entry::Data { offset, copied: false } => Action::Allocate(Fill::Cluster(offset), Old::Cluster(offset)),
        L2Entry::Zero { .. } if all_zero => Action::Nothing,
        L2Entry::Zero { offset: Some(offset), copied: true } => Action::Revive(offset),
        L2Entry::Zero { offset: Some(offset), .. } => Action::Allocate(Fill::Zero, Old::Cluster(offset)),
        L2Entry::Zero { offset: None, .. } => Action::Allocate(Fill::Zero, Old::Nothing),
        L2Entry::Unallocated if all_zero && !has_backing => Action::Nothing,
        L2Entry::Unallocated if can_be_zero => Action::MakeZero(true, Old::Nothing),
        L2Entry::Unallocated if has_backing && !whole => Action::Allocate(Fill::Below, Old::Nothing),
        L2Entry::Unallocated => Action::Allocate(Fill::Zero, Old::Nothing),
        L2Entry::Compressed { descriptor } if can_be_zero => Action::MakeZero(zero_flag, Old::Compressed(descriptor)),
        L2Entry::Compressed { descriptor } => {
            let fill = if whole { Fill::Zero } else { Fill::Compressed(descriptor) };
            Action::Allocate(fill, Old::Compressed(descriptor))
        }
    }
}
