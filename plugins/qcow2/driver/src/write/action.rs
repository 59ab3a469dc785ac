//! What is to be done with a cluster of a backing.

use crate::data_file::DataFile;
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
    /// Write all of a cluster of the data file: what does not arrive comes from below the image.
    CopyUp(HostOffset),
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
            Self::Revive(_) | Self::CopyUp(_) | Self::Allocate(..) | Self::MakeZero(..) => true,
            Self::Subclusters(change) => change.remaps(),
        }
    }

    /// Whether the cluster gets bytes. Where clusters are compressed, it becomes another one then, with another entry.
    pub(crate) fn brings_data(&self) -> bool {
        match self {
            Self::Nothing | Self::MakeZero(..) => false,
            Self::InPlace(_) | Self::Revive(_) | Self::CopyUp(_) | Self::Allocate(..) => true,
            Self::Subclusters(change) => change.written != 0,
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

/// What is to be done with a cluster, given its entry and the parts of extents that fall into it. `has_backing` tells
/// whether there is anything below the image.
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
    if let Some(data) = &image.data {
        return outside(data, has_backing, (all_zero, whole), mapped);
    }
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

/// The same of a cluster that has its place in the data file, whatever it holds there. A raw one gets zeroes as well as the
/// flag's meaning: it reads as the disk does. (It has no backing file.)
fn outside(data: &DataFile, has_backing: bool, (all_zero, whole): (bool, bool), mapped: &Mapped) -> Action {
    let here = HostOffset(mapped.guest);
    match mapped.entry {
        L2Entry::Data { .. } if all_zero && whole && !data.raw => Action::MakeZero(true, Old::Cluster(here)),
        L2Entry::Data { .. } => Action::InPlace(here),
        L2Entry::Zero { .. } if all_zero => Action::Nothing,
        L2Entry::Unallocated if all_zero && !has_backing => Action::Nothing,
        L2Entry::Unallocated if all_zero && whole => Action::MakeZero(true, Old::Nothing),
        L2Entry::Unallocated if has_backing && !whole => Action::CopyUp(here),
        L2Entry::Unallocated | L2Entry::Zero { .. } | L2Entry::Compressed { .. } => Action::Revive(here),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_guest_sdk::Content;
    use instar_qcow2_format::GuestCluster;
    use instar_qcow2_testkit::builder::Spec;

    const DATA: Content = Content::Data { device: 0, offset: 0 };
    const HOST: HostOffset = HostOffset(1 << 16);

    fn part(start: u64, length: u64, content: Content) -> ClusterExtent {
        ClusterExtent { cluster: GuestCluster(1), start, length, content }
    }

    fn decide(version: u32, has_backing: bool, entry: L2Entry, part: ClusterExtent) -> Action {
        let (_, image) = open(&Spec::new(9, 100 << 9).version(version));
        action(&image, has_backing, &[part], &Mapped { guest: 512, at: 0, entry, subclusters: None })
    }

    #[test]
    fn data_goes_where_it_belongs_to_nobody_else() {
        let some = part(0, 100, DATA);
        let data = |copied| L2Entry::Data { offset: HOST, copied };
        assert_eq!(decide(3, true, data(true), some), Action::InPlace(HOST));
        let copied = Action::Allocate(Fill::Cluster(HOST), Old::Cluster(HOST));
        assert_eq!(decide(3, true, data(false), some), copied);
        assert_eq!(decide(3, true, L2Entry::Unallocated, some), Action::Allocate(Fill::Below, Old::Nothing));
        assert_eq!(decide(3, false, L2Entry::Unallocated, some), Action::Allocate(Fill::Zero, Old::Nothing));
        let all = part(0, 512, DATA);
        assert_eq!(decide(3, true, L2Entry::Unallocated, all), Action::Allocate(Fill::Zero, Old::Nothing));
        let compressed = L2Entry::Compressed { descriptor: 5 };
        let decoded = Action::Allocate(Fill::Compressed(5), Old::Compressed(5));
        assert_eq!((decide(3, true, compressed, some), decoded.decodes()), (decoded, Some(5)));
        assert_eq!(decide(3, true, compressed, all), Action::Allocate(Fill::Zero, Old::Compressed(5)));
        let kept = L2Entry::Zero { offset: Some(HOST), copied: true };
        assert_eq!(decide(3, true, kept, some), Action::Revive(HOST));
    }

    #[test]
    fn zeroes_are_written_only_where_nothing_else_will_do() {
        let (some, all) = (part(0, 100, Content::Zero), part(0, 512, Content::Zero));
        let data = L2Entry::Data { offset: HOST, copied: true };
        assert_eq!(decide(3, true, data, all), Action::MakeZero(true, Old::Cluster(HOST)));
        assert_eq!(decide(3, true, data, some), Action::InPlace(HOST));
        // Version 2 has no zero flag: nothing below, an unallocated cluster will do.
        assert_eq!(decide(2, false, data, all), Action::MakeZero(false, Old::Cluster(HOST)));
        assert_eq!(decide(2, true, data, all), Action::InPlace(HOST));
        assert_eq!(decide(3, true, L2Entry::Unallocated, all), Action::MakeZero(true, Old::Nothing));
        assert_eq!(decide(3, false, L2Entry::Unallocated, all), Action::Nothing);
        assert_eq!(decide(3, true, L2Entry::Zero { offset: None, copied: false }, some), Action::Nothing);
    }
}
