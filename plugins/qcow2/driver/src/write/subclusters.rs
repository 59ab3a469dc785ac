//! Extended L2 entries: how the parts of extents fall onto the subclusters of a cluster.
//!
//! Nothing is allocated or copied for a subcluster that none of them touches, unless the whole cluster has to move. A
//! subcluster that reads as zeroes afterwards as a whole is only marked so; one that is written in part gets the rest of
//! its bytes from where they are now.

use crate::image::Image;
use crate::metadata::l2_entry::Mapped;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::{Fill, Old};
use instar_qcow2_format::{GuestCluster, HostOffset, L2Entry, Subclusters, SUBCLUSTERS};

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
fn states(entry: L2Entry, mixed: Option<Subclusters>) -> Subclusters {
    mixed.unwrap_or(match entry {
        L2Entry::Data { .. } => Subclusters { allocated: u32::MAX, zero: 0 },
        L2Entry::Zero { .. } => Subclusters { allocated: 0, zero: u32::MAX },
        L2Entry::Unallocated | L2Entry::Compressed { .. } => Subclusters { allocated: 0, zero: 0 },
    })
}

/// Subclusters of `each` bytes that hold any byte of `start..end`.
fn touched(start: u64, end: u64, each: u64) -> u32 {
    let below = |count: u64| u32::try_from((1u64 << count.min(32)) - 1).unwrap_or(u32::MAX);
    if start >= end {
        return 0;
    }
    below(end.div_ceil(each)) & !below(start / each)
}

/// Subclusters of `each` bytes of which `start..end` holds all bytes before `visible`.
fn covered(start: u64, end: u64, each: u64, visible: u64) -> u32 {
    let end = if end >= visible { visible.next_multiple_of(each) } else { end / each * each };
    touched(start.next_multiple_of(each), end, each)
}

/// Bytes of a subcluster.
pub(crate) fn subcluster_bytes(image: &Image) -> u64 {
    image.cluster_size().bytes() / u64::from(SUBCLUSTERS)
}

/// The subclusters of a cluster that the disk has.
pub(crate) fn visible_subclusters(image: &Image, cluster: GuestCluster) -> u32 {
    touched(0, image.visible_bytes(cluster), subcluster_bytes(image))
}

/// What is to be done with a cluster, given its extended entry and the parts of extents that fall into it; `None` if it
/// reads as it should already.
pub(crate) fn subcluster_change(
    image: &Image,
    has_backing: bool,
    extents: &[ClusterExtent],
    mapped: &Mapped,
) -> Option<SubclusterChange> {
    let (entry, mixed) = (mapped.entry, mapped.subclusters);
    let cluster = extents.first()?.cluster;
    let (each, visible) = (subcluster_bytes(image), image.visible_bytes(cluster));
    let all = visible_subclusters(image, cluster);
    let before = states(entry, mixed);
    let (mut data, mut partly_zero, mut zero) = (0, 0, 0);
    let raw = image.data.is_some_and(|data| data.raw);
    // Zeroes that follow each other, in whatever extents, cover subclusters together.
    for run in extents.chunk_by(|a, b| a.is_zero() == b.is_zero() && a.start + a.length == b.start) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let (start, end) = (first.start, last.start + last.length);
        // A raw data file reads as the disk does: zeroes are written to it.
        if first.is_zero() && raw {
            partly_zero |= touched(start, end, each);
        } else if first.is_zero() {
            zero |= covered(start, end, each, visible);
            partly_zero |= touched(start, end, each);
        } else {
            data |= touched(start, end, each);
        }
    }
    let compressed = matches!(entry, L2Entry::Compressed { .. });
    let reads_zero = before.zero | if has_backing || compressed { 0 } else { !before.allocated };
    // Zeroes over what reads as zeroes already are nothing to do.
    partly_zero &= !reads_zero;
    zero &= !reads_zero;
    let written = data | (partly_zero & !zero);
    if written | zero == 0 {
        return None;
    }
    let after = Subclusters {
        allocated: (before.allocated & !zero | written) & all,
        zero: (before.zero & !written | zero) & all,
    };
    let decoded = |descriptor| {
        let stays = all & !zero;
        let after = Subclusters { allocated: stays, zero };
        let place = if stays == 0 { Place::Nowhere } else { Place::New };
        let fill = if stays == 0 { Fill::Zero } else { Fill::Compressed(descriptor) };
        SubclusterChange { place, fill, old: Old::Compressed(descriptor), before, after, written: stays }
    };
    let change = |place, fill, old| SubclusterChange { place, fill, old, before, after, written };
    if image.data.is_some() {
        // It has its place, and keeps it: only the reference goes.
        let here = HostOffset(mapped.guest);
        let held = entry.host().is_some();
        return Some(match after.allocated {
            0 => change(Place::Nowhere, Fill::Zero, if held { Old::Cluster(here) } else { Old::Nothing }),
            _ => change(Place::Here(here, true), Fill::Zero, Old::Nothing),
        });
    }
    Some(match (entry, entry.host()) {
        (L2Entry::Compressed { descriptor }, _) => decoded(descriptor),
        (_, Some((host, _))) if after.allocated == 0 => change(Place::Nowhere, Fill::Zero, Old::Cluster(host)),
        // Shared with a snapshot: copy on write. Without a byte to write the two can go on sharing it.
        (_, Some((host, false))) if written != 0 => {
            SubclusterChange { written: after.allocated, ..change(Place::New, Fill::Cluster(host), Old::Cluster(host)) }
        }
        (_, Some((host, copied))) => change(Place::Here(host, copied), Fill::Zero, Old::Nothing),
        (_, None) if after.allocated == 0 => change(Place::Nowhere, Fill::Zero, Old::Nothing),
        (_, None) => change(Place::New, Fill::Zero, Old::Nothing),
    })
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
