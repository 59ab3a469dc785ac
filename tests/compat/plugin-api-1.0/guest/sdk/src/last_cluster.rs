//! The compressed cluster that was decoded last. A read of a part of a cluster is mostly followed by one of the next part.

use crate::error::{overflow, DriverResult};
use alloc::vec::Vec;

/// The bytes of one decoded cluster, and the key by which its driver finds it in the file.
///
/// # Example
///
/// ```
/// use instar_guest_sdk::LastCluster;
///
/// let (mut last, mut part) = (LastCluster::default(), [0; 2]);
/// last.read(7, 8, 4, &mut part, |cluster| Ok(cluster.fill(5))).unwrap();
/// // The cluster with this key is not decoded again.
/// last.read(7, 8, 6, &mut part, |_| unreachable!()).unwrap();
/// assert_eq!(part, [5, 5]);
/// ```
#[derive(Debug)]
pub struct LastCluster<K> {
    key: Option<K>,
    bytes: Vec<u8>,
}

impl<K> Default for LastCluster<K> {
    fn default() -> Self {
        Self { key: None, bytes: Vec::new() }
    }
}

impl<K: Copy + PartialEq> LastCluster<K> {
    /// Fill `buffer` with the bytes from `start` on of the cluster with this key, which has `size` bytes. If it is not the last
    /// one, `decode` fills a whole cluster: the buffer itself if all of it is wanted, otherwise one that is kept.
    ///
    /// # Errors
    /// Those of `decode`; a range that lies outside of the cluster.
    pub fn read(
        &mut self,
        key: K,
        size: usize,
        start: u64,
        buffer: &mut [u8],
        decode: impl FnOnce(&mut [u8]) -> DriverResult<()>,
    ) -> DriverResult<()> {
        if self.key != Some(key) {
            if start == 0 && buffer.len() == size {
                return decode(buffer);
            }
            self.key = None;
            self.bytes.resize(size, 0);
            decode(&mut self.bytes)?;
            self.key = Some(key);
        }
        let start = usize::try_from(start).map_err(|_| overflow("an offset in a cluster"))?;
        let part = start.checked_add(buffer.len()).and_then(|end| self.bytes.get(start..end));
        buffer.copy_from_slice(part.ok_or_else(|| overflow("a part of a cluster"))?);
        Ok(())
    }
}
