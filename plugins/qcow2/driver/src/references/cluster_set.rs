//! Which host clusters are referenced, in bounded memory.
//!
//! A sparse bitmap: 4,096 clusters a chunk. When the budget is used up the set gives up its highest chunks and
//! remembers where it stopped; the caller then makes another pass for the clusters from there on. Each pass settles at
//! least a budget's worth of chunks, so the number of passes follows from the clusters in the file, not from a hostile
//! offset.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use instar_qcow2_format::HostCluster;

const CHUNK_BITS: u32 = 12;
const WORDS: usize = (1 << CHUNK_BITS) / 64;

/// Memory that one chunk takes, in bytes, bookkeeping included.
const CHUNK_COST: usize = WORDS * 8 + 64;

/// A set of host clusters within `floor..ceiling`.
pub struct ClusterSet {
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
    max_chunks: usize,
    floor: u64,
    ceiling: u64,
}

impl ClusterSet {
    /// An empty set of clusters from `floor` on that takes at most `budget` bytes.
    #[must_use]
    pub fn new(floor: HostCluster, budget: usize) -> Self {
        Self { chunks: BTreeMap::new(), max_chunks: (budget / CHUNK_COST).max(1), floor: floor.0, ceiling: u64::MAX }
    }

    /// Add a cluster. Returns `false` if it was in the set. Clusters outside `floor..ceiling` are not
    /// recorded and count as new.
    pub fn insert(&mut self, cluster: HostCluster) -> bool {
        if cluster.0 < self.floor || cluster.0 >= self.ceiling {
            return true;
        }
        let chunk = cluster.0 >> CHUNK_BITS;
        if !self.chunks.contains_key(&chunk) && self.chunks.len() >= self.max_chunks {
            self.give_up_above(chunk);
            if cluster.0 >= self.ceiling {
                return true;
            }
        }
        let words = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; WORDS]));
        let bit = cluster.0 & ((1 << CHUNK_BITS) - 1);
        let Some(word) = usize::try_from(bit / 64).ok().and_then(|index| words.get_mut(index)) else {
            return true;
        };
        let mask = 1 << (bit % 64);
        let fresh = *word & mask == 0;
        *word |= mask;
        fresh
    }

    /// Add `count` clusters from `first` on. Returns `false` if one of them was in the set. As [`ClusterSet::insert`], but
    /// 64 of them at once: the table of a few bytes may claim millions.
    pub fn insert_range(&mut self, first: HostCluster, count: u64) -> bool {
        let mut at = first.0.max(self.floor);
        let end = first.0.saturating_add(count);
        let mut fresh = true;
        while at < end.min(self.ceiling) {
            let whole = at.is_multiple_of(64) && end - at >= 64;
            // The first cluster of a word makes its chunk, and decides whether there is room for that.
            fresh &= self.insert(HostCluster(at));
            let bit = at & ((1 << CHUNK_BITS) - 1);
            let chunk = self.chunks.get_mut(&(at >> CHUNK_BITS));
            let word = chunk.and_then(|words| words.get_mut(usize::try_from(bit / 64).ok()?));
            match word.filter(|_| whole) {
                Some(word) => {
                    fresh &= *word == 1;
                    *word = u64::MAX;
                    at += 64;
                }
                None => at += 1,
            }
        }
        fresh
    }

    /// Make room for `chunk` by giving up the highest chunk, which may be `chunk` itself.
    fn give_up_above(&mut self, chunk: u64) {
        let highest = self.chunks.last_key_value().map_or(chunk, |(&key, _)| key).max(chunk);
        self.chunks.remove(&highest);
        self.ceiling = highest << CHUNK_BITS;
    }

    /// Whether a recorded cluster is in the set.
    #[must_use]
    pub fn contains(&self, cluster: HostCluster) -> bool {
        let bit = cluster.0 & ((1 << CHUNK_BITS) - 1);
        self.chunks
            .get(&(cluster.0 >> CHUNK_BITS))
            .and_then(|words| words.get(usize::try_from(bit / 64).ok()?))
            .is_some_and(|word| word & (1 << (bit % 64)) != 0)
    }

    /// Whether a cluster may have been added: it is in the set, or the set gave up what is as high as that.
    #[must_use]
    pub fn may_contain(&self, cluster: HostCluster) -> bool {
        cluster.0 >= self.ceiling || self.contains(cluster)
    }

    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.ceiling == u64::MAX
    }

    /// The number of the chunk in which a cluster is recorded.
    #[must_use]
    pub const fn chunk_of(cluster: HostCluster) -> u64 {
        cluster.0 >> CHUNK_BITS
    }

    /// The first cluster of a chunk.
    #[must_use]
    pub const fn first_of(chunk: u64) -> HostCluster {
        HostCluster(chunk << CHUNK_BITS)
    }

    /// Whether [`ClusterSet::may_contain`] holds for any cluster of a chunk.
    #[must_use]
    pub fn may_reach(&self, chunk: u64) -> bool {
        chunk >= self.ceiling >> CHUNK_BITS || self.chunks.contains_key(&chunk)
    }

    /// Where the next pass has to begin, if clusters were given up.
    #[must_use]
    pub fn next_floor(&self) -> Option<HostCluster> {
        (self.ceiling != u64::MAX).then_some(HostCluster(self.ceiling))
    }

    /// All recorded clusters, ascending.
    pub fn iter(&self) -> impl Iterator<Item = HostCluster> + '_ {
        self.chunks.iter().flat_map(|(&chunk, words)| {
            words.iter().enumerate().flat_map(move |(index, &word)| {
                (0..64u64)
                    .filter(move |bit| word & (1 << bit) != 0)
                    .map(move |bit| HostCluster((chunk << CHUNK_BITS) + index as u64 * 64 + bit))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn reports_duplicates_and_iterates_in_order() {
        let mut set = ClusterSet::new(HostCluster(0), 1 << 20);
        for cluster in [5000, 1, 63, 64, 4095, 4096] {
            assert!(set.insert(HostCluster(cluster)));
        }
        assert!(!set.insert(HostCluster(64)));
        assert!(set.contains(HostCluster(5000)) && !set.contains(HostCluster(5001)));
        let all: Vec<u64> = set.iter().map(|c| c.0).collect();
        assert_eq!(all, [1, 63, 64, 4095, 4096, 5000]);
        assert_eq!(set.next_floor(), None);
    }

    #[test]
    fn a_range_is_as_many_clusters() {
        for (first, count) in [(0, 1), (5, 300), (64, 64), (4000, 200), (63, 66), (100, 0)] {
            let (mut one_by_one, mut range) =
                (ClusterSet::new(HostCluster(3), 1 << 20), ClusterSet::new(HostCluster(3), 1 << 20));
            for set in [&mut one_by_one, &mut range] {
                assert!(set.insert(HostCluster(200)));
            }
            let inserted: Vec<bool> = (first..first + count).map(|c| one_by_one.insert(HostCluster(c))).collect();
            let fresh = inserted.iter().all(|&fresh| fresh);
            assert_eq!(range.insert_range(HostCluster(first), count), fresh, "{first} {count}");
            assert!(one_by_one.iter().eq(range.iter()), "{first} {count}");
        }
        // What does not fit is left to a later pass.
        let mut small = ClusterSet::new(HostCluster(0), 2 * CHUNK_COST);
        assert!(small.insert_range(HostCluster(10), 1 << 40));
        assert_eq!(small.next_floor(), Some(HostCluster(2 << CHUNK_BITS)));
        assert_eq!(small.iter().count(), (2 << CHUNK_BITS) - 10);
    }

    #[test]
    fn passes_over_a_small_budget_see_every_cluster_once() {
        // Clusters far apart, in an awkward order; two chunks fit.
        let clusters: Vec<u64> = [9u64, 2, 7, 0, 8, 1, 3].iter().map(|c| c << CHUNK_BITS).collect();
        let mut seen = Vec::new();
        let mut floor = Some(HostCluster(0));
        while let Some(from) = floor {
            let mut set = ClusterSet::new(from, 2 * CHUNK_COST);
            for &cluster in &clusters {
                assert!(set.insert(HostCluster(cluster)));
            }
            seen.extend(set.iter().map(|c| c.0 >> CHUNK_BITS));
            floor = set.next_floor();
        }
        assert_eq!(seen, [0, 1, 2, 3, 7, 8, 9]);
    }

    #[test]
    fn duplicates_above_the_budget_are_found_in_a_later_pass() {
        let clusters = [0u64, 1 << CHUNK_BITS, 5 << CHUNK_BITS, 5 << CHUNK_BITS];
        let mut floor = Some(HostCluster(0));
        let mut duplicates = 0;
        while let Some(from) = floor {
            let mut set = ClusterSet::new(from, CHUNK_COST);
            duplicates += clusters.iter().filter(|&&c| !set.insert(HostCluster(c))).count();
            floor = set.next_floor();
        }
        assert_eq!(duplicates, 1);
    }
}
