//! What is to be done with a cluster of a backing.

use crate::write::contents::{Fill, Old};
use crate::write::subclusters::{Place, SubclusterChange};
use instar_qcow2_format::HostOffset;

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
