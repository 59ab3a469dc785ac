//! How often host clusters are referred to, in bounded memory.
//!
//! A sparse array in chunks, with the same answer to too many clusters as
//! [`ClusterSet`](crate::references::cluster_set::ClusterSet): the highest chunks are given up, and another pass counts
//! from there on.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use instar_qcow2_format::HostCluster;

const CHUNK_BITS: u32 = 8;
const CHUNK: usize = 1 << CHUNK_BITS;
/// Memory that one chunk takes, in bytes, bookkeeping included.
const CHUNK_COST: usize = CHUNK * 4 + 64;

/// The number of references to each host cluster within `floor..ceiling`.
pub struct CalculatedRefcounts {
    chunks: BTreeMap<u64, Box<[u32; CHUNK]>>,
    max_chunks: usize,
    floor: u64,
    ceiling: u64,
}

fn locate(cluster: HostCluster) -> (u64, usize) {
    let index = usize::try_from(cluster.0 & (CHUNK as u64 - 1)).unwrap_or(0);
    (cluster.0 >> CHUNK_BITS, index)
}

impl CalculatedRefcounts {
    /// No references yet to clusters from `floor` on; at most `budget` bytes will be taken.
    #[must_use]
    pub fn new(floor: HostCluster, budget: usize) -> Self {
        Self { chunks: BTreeMap::new(), max_chunks: (budget / CHUNK_COST).max(1), floor: floor.0, ceiling: u64::MAX }
    }

    /// `times` references more. Returns `false` if that is more than can be counted. Clusters outside `floor..ceiling` are
    /// not counted.
    #[must_use]
    pub fn add(&mut self, cluster: HostCluster, times: u32) -> bool {
        if !self.covers(cluster) {
            return true;
        }
        let (chunk, index) = locate(cluster);
        if !self.chunks.contains_key(&chunk) && self.chunks.len() >= self.max_chunks {
            let highest = self.chunks.last_key_value().map_or(chunk, |(&key, _)| key).max(chunk);
            self.chunks.remove(&highest);
            self.ceiling = highest << CHUNK_BITS;
            if !self.covers(cluster) {
                return true;
            }
        }
        let counts = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK]));
        match counts.get_mut(index).map(|count| (count.checked_add(times), count)) {
            Some((Some(more), count)) => {
                *count = more;
                true
            }
            _ => false,
        }
    }

    /// Whether references to this cluster are counted.
    #[must_use]
    pub fn covers(&self, cluster: HostCluster) -> bool {
        cluster.0 >= self.floor && cluster.0 < self.ceiling
    }

    /// The number of references to a cluster, if they are counted.
    #[must_use]
    pub fn get(&self, cluster: HostCluster) -> Option<u64> {
        let (chunk, index) = locate(cluster);
        let count = || self.chunks.get(&chunk).and_then(|counts| counts.get(index)).copied().unwrap_or(0);
        self.covers(cluster).then(|| u64::from(count()))
    }

    /// First cluster that is counted, and the first one after it that is not.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        (self.floor, self.ceiling)
    }

    /// Where the next pass has to begin, if clusters were given up.
    #[must_use]
    pub fn next_floor(&self) -> Option<HostCluster> {
        (self.ceiling != u64::MAX).then_some(HostCluster(self.ceiling))
    }

    /// All clusters with references, ascending, with their number.
    pub fn iter(&self) -> impl Iterator<Item = (HostCluster, u64)> + '_ {
        self.chunks.iter().flat_map(|(&chunk, counts)| {
            let first = chunk << CHUNK_BITS;
            let clusters = (first..).map(HostCluster).zip(counts.iter().map(|&count| u64::from(count)));
            clusters.filter(|&(cluster, count)| count != 0 && self.covers(cluster))
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn passes_over_a_small_budget_count_every_reference_once() {
        // Far apart, in an awkward order, some of them more than once; two chunks fit.
        let references: Vec<u64> = [9u64, 2, 7, 0, 8, 1, 3, 9, 9, 2].iter().map(|c| c << CHUNK_BITS).collect();
        let mut seen = Vec::new();
        let mut floor = Some(HostCluster(0));
        while let Some(from) = floor {
            let mut counts = CalculatedRefcounts::new(from, 2 * CHUNK_COST);
            for &cluster in &references {
                assert!(counts.add(HostCluster(cluster), 1));
            }
            for (cluster, count) in counts.iter() {
                assert_eq!(counts.get(cluster), Some(count));
                seen.push((cluster.0 >> CHUNK_BITS, count));
            }
            floor = counts.next_floor();
            assert!(floor.is_none_or(|next| counts.get(next).is_none()));
        }
        assert_eq!(seen, [(0, 1), (1, 1), (2, 2), (3, 1), (7, 1), (8, 1), (9, 3)]);
    }
}
