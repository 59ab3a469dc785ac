//! How the subclusters of a cluster change, and which of them a range of bytes touches.

use crate::write::contents::{Fill, Old};
use instar_qcow2_format::{HostOffset, L2Entry, Subclusters};

/// Where the data of a cluster stands afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In no host cluster.
    Nowhere,
    /// In the host cluster that is there; whether it is for this entry alone (COPIED).
    Here(HostOffset, bool),
    /// In a new one.
    New,
}

/// What is to be done with a cluster that has an extended L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SubclusterChange {
    pub(crate) place: Place,
    /// Where the bytes come from that were the cluster's own: a host cluster that is left, or a compressed one.
    pub(crate) fill: Fill,
    /// What the entry refers to no longer.
    pub(crate) old: Old,
    /// The subclusters before; of a compressed cluster none has a state of its own.
    pub(crate) before: Subclusters,
    /// The subclusters afterwards.
    pub(crate) after: Subclusters,
    /// Subclusters that receive bytes.
    pub(crate) written: u32,
}

impl SubclusterChange {
    /// Whether the entry changes.
    pub(crate) fn remaps(&self) -> bool {
        self.before != self.after || !matches!(self.place, Place::Here(..))
    }
}

/// The state of all 32 subclusters, also of those that a standard entry stands for.
pub(crate) fn states(entry: L2Entry, mixed: Option<Subclusters>) -> Subclusters {
    mixed.unwrap_or(match entry {
        L2Entry::Data { .. } => Subclusters { allocated: u32::MAX, zero: 0 },
        L2Entry::Zero { .. } => Subclusters { allocated: 0, zero: u32::MAX },
        L2Entry::Unallocated | L2Entry::Compressed { .. } => Subclusters { allocated: 0, zero: 0 },
    })
}

/// Subclusters of `each` bytes that hold any byte of `start..end`.
pub(crate) fn touched(start: u64, end: u64, each: u64) -> u32 {
    let below = |count: u64| u32::try_from((1u64 << count.min(32)) - 1).unwrap_or(u32::MAX);
    if start >= end {
        return 0;
    }
    below(end.div_ceil(each)) & !below(start / each)
}

/// Subclusters of `each` bytes of which `start..end` holds all bytes before `visible`.
pub(crate) fn covered(start: u64, end: u64, each: u64, visible: u64) -> u32 {
    let end = if end >= visible { visible.next_multiple_of(each) } else { end / each * each };
    touched(start.next_multiple_of(each), end, each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_subclusters() {
        assert_eq!(touched(0, 1, 2048), 1);
        assert_eq!(touched(2047, 2049, 2048), 0b11);
        assert_eq!(touched(2048, 4096, 2048), 0b10);
        assert_eq!(touched(0, 65536, 2048), u32::MAX);
        assert_eq!(touched(63 << 10, 64 << 10, 2048), 1 << 31);
        assert_eq!(touched(5, 5, 2048), 0);
        assert_eq!(covered(0, 2047, 2048, 65536), 0);
        assert_eq!(covered(1, 4096, 2048, 65536), 0b10);
        assert_eq!(covered(1, 2049, 2048, 65536), 0);
        // The disk ends within the second one.
        assert_eq!(covered(2048, 2560, 2048, 2560), 0b10);
        assert_eq!(covered(0, 65536, 2048, 65536), u32::MAX);
    }
}
