//! What a verdict may depend on besides the image itself.

use crate::ImageFacts;
use abi_stable::std_types::ROption;
use abi_stable::StableAbi;

/// What an operation does around the image that a verdict is asked for.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct Context<'a> {
    /// What the image is backed by, if it takes part. It may be of another format.
    pub parent: ROption<&'a ImageFacts>,
    /// An image below this one is written to: what this one does not hold itself changes with it.
    pub below_changes: bool,
    /// It is the parent itself that is written to, and gets [another identity](crate::FormatPlugin::next_identity), which
    /// this image has to record.
    pub parent_identity_changes: bool,
    /// What may arrive at an image with [`Role::Write`](crate::Role::Write).
    pub incoming: ROption<Incoming>,
}

/// What may arrive at an image that is written to, whatever the formats that it comes from. Nothing of it is more than what
/// headers and lengths of files say.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Size of the disk that arrives, in bytes. It may be larger than the image's: whether that may grow, the engine decides.
    pub virtual_size: u64,
    /// Bytes of a cluster of what arrives: a power of two, 512 at least. Divide the disk into such clusters, the first of which
    /// begins at 0: something arrives, data or zeroes, in no more than [`max_clusters`](Self::max_clusters) of them.
    pub cluster_size: u64,
    /// In how many of those clusters something arrives at most.
    pub max_clusters: u64,
    /// An image that stays above this one records its identity: a copy that has another one would not do in its place.
    pub identity_recorded: bool,
}

impl<'a> Context<'a> {
    /// Of an image that is read.
    #[must_use]
    pub fn reading(parent: Option<&'a ImageFacts>, below_changes: bool) -> Self {
        Self { parent: parent.into(), below_changes, parent_identity_changes: false, incoming: ROption::RNone }
    }

    /// Of an image that this arrives at.
    #[must_use]
    pub fn writing(parent: Option<&'a ImageFacts>, incoming: Incoming) -> Self {
        Self { incoming: ROption::RSome(incoming), ..Self::reading(parent, false) }
    }

    /// What may arrive at the image with the facts `own`: if nobody says, all of its disk.
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
    /// What arrives from these images, which are seen as one disk: the top-most first, which decides how large that is. `None`
    /// for no image.
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

    /// In how many units of so many bytes (a power of two), counted from the begin of the disk, something arrives at most.
    #[must_use]
    pub fn units(&self, unit: u64) -> u64 {
        let unit = unit.max(1);
        let each = self.cluster_size.div_ceil(unit);
        self.max_clusters.saturating_mul(each).min(self.virtual_size.div_ceil(unit))
    }
}
