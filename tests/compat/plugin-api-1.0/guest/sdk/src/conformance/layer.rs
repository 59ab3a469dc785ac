//! What an image is to hold: the model that images are built from and compared with.

use crate::random::Random;
use alloc::vec::Vec;

/// Bytes of a sector: disks are made of whole ones.
pub const SECTOR: u64 = 512;

/// What a layer holds of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing: what is below shows.
    Nothing,
    /// The bytes of [`Layer::bytes`].
    Data,
    /// Zeroes, without a place in the file.
    Zero,
    /// The bytes of [`Layer::bytes`], as only the format can decode them (compressed).
    Encoded,
}

/// What a layer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Virtual size in bytes: whole sectors, not always whole clusters.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// By cluster: as many as the disk has, the last of which may be cut.
    pub held: Vec<Held>,
    /// There is an image below: what the layer does not hold is seen there, and is zero otherwise.
    pub has_backing: bool,
    /// Tells the bytes of one layer from those of another.
    pub seed: u8,
}

impl Layer {
    /// The clusters that the layer holds anything of: number and state.
    pub fn clusters(&self) -> impl Iterator<Item = (u64, Held)> + '_ {
        (0..).zip(self.held.iter().copied()).filter(|(_, held)| *held != Held::Nothing)
    }

    /// The bytes of a cluster that holds data, as many as the disk has of it. They differ from cluster to cluster and from
    /// layer to layer, and are never zero.
    #[must_use]
    pub fn bytes(&self, cluster: u64) -> Vec<u8> {
        let start = cluster.saturating_mul(self.cluster);
        let end = start.saturating_add(self.cluster).min(self.size);
        let byte = |at: u64| {
            ((at / 7) ^ (at / SECTOR)).wrapping_add(u64::from(self.seed).wrapping_mul(37)).to_le_bytes()[0] | 1
        };
        (start..end).map(byte).collect()
    }

    /// What a guest reads over these bytes; past their end it reads zeroes.
    #[must_use]
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        let mut disk = below.to_vec();
        disk.resize(usize::try_from(self.size).unwrap_or(0), 0);
        for (cluster, held) in self.clusters() {
            let mut bytes = self.bytes(cluster);
            if held == Held::Zero {
                bytes.fill(0);
            }
            let start = usize::try_from(cluster.saturating_mul(self.cluster)).unwrap_or(usize::MAX);
            let place = start.checked_add(bytes.len()).and_then(|end| disk.get_mut(start..end));
            place.unwrap_or_default().copy_from_slice(&bytes);
        }
        disk
    }

    /// A layer of `size` bytes whose clusters are drawn from `states`, in runs.
    pub(super) fn drawn(random: &mut Random, (size, cluster): (u64, u64), states: &[Held], has_backing: bool) -> Self {
        let mut held = Vec::new();
        while (held.len() as u64) < size.div_ceil(cluster) {
            let state = *random.pick(states);
            held.extend((0..=random.index(3)).map(|_| state));
        }
        held.truncate(usize::try_from(size.div_ceil(cluster)).unwrap_or(0));
        Self { size, cluster, held, has_backing, seed: random.byte() }
    }
}
