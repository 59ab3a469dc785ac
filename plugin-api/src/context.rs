//! The circumstances that a verdict may depend on in addition to the image itself.

use crate::ImageFacts;
use abi_stable::std_types::ROption;
use abi_stable::StableAbi;

/// The surroundings of an image in an operation, passed to [`FormatPlugin::verdict`](crate::FormatPlugin::verdict).
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The image that this one is backed by, if it takes part. It may have another format.
    pub parent: ROption<&'a ImageFacts>,
    /// Whether the operation writes to an image below this one: every cluster that this one does not hold itself changes with
    /// it.
    pub below_changes: bool,
    /// Whether the operation writes to the parent itself, which then gets [another
    /// identity](crate::FormatPlugin::next_identity) that this image has to record.
    pub parent_identity_changes: bool,
    /// The data that may arrive at an image with [`Role::Write`](crate::Role::Write).
    pub incoming: ROption<Incoming>,
}

/// A bound for the data that may arrive at an image, independent of the formats that it comes from. The engine derives it from
/// headers and file lengths alone.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Size of the disk that arrives, in bytes. It may be larger than the image's; the engine decides whether the image may
    /// grow.
    pub virtual_size: u64,
    /// Cluster size of the arriving data in bytes: a power of two, at least 512. Divide the disk into such clusters, starting
    /// at 0: data or zeroes arrive in at most [`max_clusters`](Self::max_clusters) of them.
    pub cluster_size: u64,
    /// Upper bound for the number of those clusters in which anything arrives.
    pub max_clusters: u64,
    /// Whether an image that stays above this one records its identity: a copy with another identity cannot replace it.
    pub identity_recorded: bool,
}

impl<'a> Context<'a> {
    /// Describe the surroundings of an image that is only read.
    #[must_use]
    pub fn reading(parent: Option<&'a ImageFacts>, below_changes: bool) -> Self {
        Self { parent: parent.into(), below_changes, parent_identity_changes: false, incoming: ROption::RNone }
    }

    /// Describe the surroundings of an image that `incoming` arrives at.
    #[must_use]
    pub fn writing(parent: Option<&'a ImageFacts>, incoming: Incoming) -> Self {
        Self { incoming: ROption::RSome(incoming), ..Self::reading(parent, false) }
    }

    /// Return the bound for the data that arrives at the image with the facts `own`: its whole disk, if the engine gave no
    /// bound.
    #[must_use]
    pub fn arriving(&self, own: &ImageFacts) -> Incoming {
        self.incoming.into_option().unwrap_or_else(|| {
            let unit = own.unit();
            let max_clusters = own.virtual_size.div_ceil(unit);
            Incoming { virtual_size: own.virtual_size, cluster_size: unit, max_clusters, identity_recorded: false }
        })
    }
}

impl Incoming {
    /// Bound the data that arrives from these layers of one disk, top-most first; the top-most layer determines the size of the
    /// disk. `None` without layers.
    #[must_use]
    pub fn from_layers<'f>(layers: impl IntoIterator<Item = &'f ImageFacts>) -> Option<Self> {
        let mut layers = layers.into_iter();
        let top = layers.next()?;
        let (mut lowest, mut shortest) = (top, top.virtual_size);
        let mut incoming = Self {
            virtual_size: top.virtual_size,
            cluster_size: top.unit(),
            max_clusters: top.max_allocated_clusters,
            identity_recorded: false,
        };
        for layer in layers {
            // Clusters are powers of two: one of a smaller size lies within one of the largest.
            incoming.cluster_size = incoming.cluster_size.max(layer.unit());
            incoming.max_clusters = incoming.max_clusters.saturating_add(layer.max_allocated_clusters);
            shortest = shortest.min(layer.virtual_size);
            lowest = layer;
        }
        // From the end of a shorter layer on, zeroes arrive that no file has to say.
        let beyond = match top.virtual_size.saturating_sub(shortest) {
            0 => 0,
            bytes => bytes.div_ceil(incoming.cluster_size).saturating_add(1),
        };
        let disk = incoming.virtual_size.div_ceil(incoming.cluster_size);
        incoming.max_clusters = incoming.max_clusters.saturating_add(beyond).min(disk);
        incoming.identity_recorded = !lowest.parent_identity.is_empty();
        Some(incoming)
    }

    /// Convert the bound to units of `unit` bytes (a power of two), counted from the beginning of the disk.
    #[must_use]
    pub fn units(&self, unit: u64) -> u64 {
        let unit = unit.max(1);
        let each = self.cluster_size.div_ceil(unit);
        self.max_clusters.saturating_mul(each).min(self.virtual_size.div_ceil(unit))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn layer(virtual_size: u64, cluster_size: u64, entries: u64) -> ImageFacts {
        ImageFacts::new("test", virtual_size, cluster_size, 0).with_clusters_at_most(entries)
    }

    #[test]
    fn a_single_layer_brings_what_it_holds() {
        let incoming = Incoming::from_layers([&layer(1 << 30, 65536, 10)]).unwrap();
        assert_eq!((incoming.virtual_size, incoming.cluster_size, incoming.max_clusters), (1 << 30, 65536, 10));
        for (unit, units) in [(512, 1280), (4096, 160), (65536, 10), (1 << 20, 10), (1 << 30, 1)] {
            assert_eq!(incoming.units(unit), units, "{unit}");
        }
        let raw = Incoming::from_layers([&ImageFacts::new("test", 1 << 20, 0, 0)]).unwrap();
        assert_eq!((raw.cluster_size, raw.max_clusters, raw.units(65536)), (512, 2048, 16));
        assert_eq!(Incoming::from_layers([]), None);
    }

    #[test]
    fn several_layers_bring_the_sum_and_no_more_than_the_disk() {
        let (top, middle) = (layer(1 << 30, 4096, 10), layer(1 << 30, 65536, 5));
        let both = Incoming::from_layers([&top, &middle]).unwrap();
        assert_eq!((both.cluster_size, both.max_clusters), (65536, 15));
        let full = layer(1 << 30, 65536, u64::MAX);
        assert_eq!(Incoming::from_layers([&top, &full, &full]).unwrap().max_clusters, 1 << 14);
        // The top decides how large the disk is.
        let large = layer(1 << 40, 65536, u64::MAX);
        assert_eq!(Incoming::from_layers([&top, &large]).unwrap().max_clusters, 1 << 14);
    }

    #[test]
    fn zeroes_past_the_end_of_a_shorter_layer_arrive() {
        let (top, short) = (layer(1 << 30, 65536, 1), layer((1 << 30) - (1 << 20) - 512, 65536, 1));
        // 17 clusters, the first of which the short layer has a part of, and one for good measure.
        assert_eq!(Incoming::from_layers([&top, &short]).unwrap().max_clusters, 2 + 17 + 1);
    }

    #[test]
    fn the_lowest_layer_records_an_identity() {
        let (plain, mut recording) = (layer(1, 512, 1), layer(1, 512, 1));
        recording.parent_identity = vec![1].into();
        assert!(Incoming::from_layers([&plain, &recording]).unwrap().identity_recorded);
        assert!(!Incoming::from_layers([&recording, &plain]).unwrap().identity_recorded);
    }

    #[test]
    fn who_knows_nothing_expects_all_of_the_disk() {
        let own = layer((1 << 20) + 1, 65536, 0);
        assert_eq!(Context::reading(None, false).arriving(&own).max_clusters, 17);
    }
}
