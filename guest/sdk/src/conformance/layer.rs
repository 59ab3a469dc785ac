//! The model of a layer: images are built from it and compared with it.

use crate::random::Random;
use alloc::vec::Vec;

/// Size of a sector in bytes. The size of a disk is a multiple of it.
pub const SECTOR: u64 = 512;

/// The state of a cluster in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Not held: the image below shows through.
    Nothing,
    /// The bytes of [`Layer::bytes`].
    Data,
    /// Zeroes that take no space in the file.
    Zero,
    /// The bytes of [`Layer::bytes`], encoded as only the format can decode them (compressed).
    Encoded,
}

/// The content of a layer, from which [`Builder::build`](super::Builder::build) makes an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Virtual size in bytes: a multiple of [`SECTOR`], but not always of the cluster size.
    pub size: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// The state of each cluster of the disk. The last cluster may extend past the disk's end.
    pub held: Vec<Held>,
    /// Whether there is an image below. If not, clusters that the layer does not hold read as zeroes.
    pub has_backing: bool,
    /// Number that makes the bytes of this layer differ from those of others.
    pub seed: u8,
}

impl Layer {
    /// Return number and state of each cluster that the layer holds.
    pub fn clusters(&self) -> impl Iterator<Item = (u64, Held)> + '_ {
        (0..).zip(self.held.iter().copied()).filter(|(_, held)| *held != Held::Nothing)
    }

    /// Return the bytes of the cluster with this number, up to the end of the disk. They differ from cluster to cluster and
    /// from layer to layer, and none of them is zero.
    #[must_use]
    pub fn bytes(&self, cluster: u64) -> Vec<u8> {
        let start = cluster.saturating_mul(self.cluster);
        let end = start.saturating_add(self.cluster).min(self.size);
        let byte = |at: u64| {
            ((at / 7) ^ (at / SECTOR)).wrapping_add(u64::from(self.seed).wrapping_mul(37)).to_le_bytes()[0] | 1
        };
        (start..end).map(byte).collect()
    }

    /// Return the bytes that a guest reads of this layer over the bytes `below`, past whose end it reads zeroes.
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

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn a_layer_hides_what_is_below() {
        let held = vec![Held::Nothing, Held::Data, Held::Zero, Held::Encoded];
        let layer = Layer { size: 7 * 512, cluster: 1024, held, has_backing: true, seed: 3 };
        let content = layer.content(&[9; 5000]);
        assert_eq!(content.len(), 7 * 512);
        assert!(content[..1024].iter().all(|&byte| byte == 9) && content[2048..3072].iter().all(|&byte| byte == 0));
        assert_eq!((&content[1024..2048], &content[3072..]), (&layer.bytes(1)[..], &layer.bytes(3)[..]));
        assert_eq!(layer.bytes(3).len(), 512);
        assert_ne!(layer.bytes(1)[..512], layer.bytes(3)[..]);
        let short = layer.content(&[9; 100]);
        assert!(short[..100].iter().all(|&byte| byte == 9) && short[100..1024].iter().all(|&byte| byte == 0));
    }
}
