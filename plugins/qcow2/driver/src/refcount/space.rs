//! The clusters of an image that is changed: new ones are reserved, then [published](Space::publish), then referred to;
//! those that nothing refers to any more are released.

use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::refcount::allocator::Allocator;
use crate::refcount::blocks::Refcounts;
use crate::refcount::free_clusters::FreeClusters;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_qcow2_format::HostCluster;

/// Requests that are submitted at once.
pub(crate) const BATCH: usize = 4096;

/// Clusters in the order in which they were reserved.
pub(crate) struct Reserved {
    clusters: Vec<HostCluster>,
    /// How many of them, from the first one on, hold stale bytes.
    stale: u64,
    taken: usize,
}

impl Reserved {
    /// The next one.
    ///
    /// # Errors
    /// A bug of the driver, if all were taken.
    pub(crate) fn next(&mut self) -> DriverResult<HostCluster> {
        let cluster = self.clusters.get(self.taken).copied();
        self.taken += 1;
        cluster.ok_or_else(|| overflow("the number of clusters to allocate"))
    }

    /// Those that do not read as zeroes, with their index.
    pub(crate) fn stale(&self) -> impl Iterator<Item = (usize, HostCluster)> + '_ {
        self.clusters.iter().copied().enumerate().take_while(|&(index, _)| (index as u64) < self.stale)
    }
}

/// What was allocated and is not referred to yet by anything that may be durable.
#[derive(Debug)]
struct NewSpace {
    /// Length of the file before, in bytes.
    length: u64,
    /// Clusters within it that were free.
    reused: Vec<ClusterRun>,
}

/// Refcounts, and where new clusters come from.
pub struct Space {
    /// The refcounts; what is to be written is held.
    pub(crate) refcounts: Refcounts,
    /// Hands out clusters past the end of the file.
    pub(crate) allocator: Allocator,
    /// Clusters within the file that are used again before it grows.
    pub(crate) free: FreeClusters,
    /// What is given back if the disk is full.
    unreferenced: Option<NewSpace>,
}

impl Space {
    /// The space of an image; nothing is read yet.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        Self {
            refcounts: Refcounts::new(image),
            allocator: Allocator::new(image),
            free: FreeClusters::default(),
            unreferenced: None,
        }
    }

    /// Reserve clusters, with refcount 1. Nothing durable refers to them.
    ///
    /// # Errors
    /// As [`Allocator::reserve`].
    pub(crate) fn reserve(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        out: &mut OrderedWriter,
        count: u64,
    ) -> DriverResult<Reserved> {
        let mut reused = Vec::new();
        let mut missing = count;
        while let Some(run) = self.free.take(missing) {
            missing -= run.count;
            reused.push(run);
        }
        for run in &reused {
            let mut clusters = run.clusters();
            self.refcounts.load(io, image, clusters.clone())?;
            clusters.try_for_each(|cluster| self.refcounts.set(image, cluster, 1))?;
        }
        let before = image.file_length;
        self.expect_new_space(image).reused.extend_from_slice(&reused);
        let fresh = self.allocator.reserve(io, image, &mut self.refcounts, missing)?;
        if image.file_length != before {
            out.set_length(io, image.file_length)?;
        }
        // What follows the end of a file reads as zeroes.
        let stale = if image.fixed_length { u64::MAX } else { reused.iter().map(|run| run.count).sum() };
        Ok(Reserved { clusters: reused.iter().chain(&fresh).flat_map(ClusterRun::clusters).collect(), stale, taken: 0 })
    }

    /// Reserve clusters that follow each other, with refcount 1; they read as zeroes.
    ///
    /// # Errors
    /// As [`Allocator::reserve_run`].
    pub(crate) fn reserve_run(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        out: &mut OrderedWriter,
        count: u64,
    ) -> DriverResult<HostCluster> {
        self.expect_new_space(image);
        let first = self.allocator.reserve_run(io, image, &mut self.refcounts, count)?;
        if image.fixed_length {
            let size = image.cluster_size();
            let at = size.host_offset(first).ok_or_else(|| overflow("a host offset"))?;
            out.zero(io, at.0, count * size.bytes())?;
        } else {
            out.set_length(io, image.file_length)?;
        }
        Ok(first)
    }

    /// From here on clusters are allocated that nothing durable refers to.
    fn expect_new_space(&mut self, image: &Image) -> &mut NewSpace {
        let length = image.file_length;
        self.unreferenced.get_or_insert_with(|| NewSpace { length, reused: Vec::new() })
    }

    /// From here on the device may refer to what is new: it must not be given back any more.
    pub(crate) fn referenced(&mut self) {
        self.unreferenced = None;
    }

    /// One reference less to each of these clusters, which nothing refers to any more. Nothing depends on it: it is
    /// durable with the next flush, and a crash before that leaves leaks.
    ///
    /// # Errors
    /// As [`Refcounts::release`].
    pub(crate) fn release(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        out: &mut OrderedWriter,
        clusters: Vec<HostCluster>,
    ) -> DriverResult<()> {
        if !clusters.is_empty() {
            out.written();
        }
        self.refcounts.release(io, image, clusters)
    }

    /// Give back what is new and not referred to by anything durable, so that the disk is no fuller than it has to be. A
    /// crash within it, or a failure, leaves leaks at most: nothing else is concerned.
    pub(crate) fn give_back(&mut self, io: &mut dyn BlockIo, image: &mut Image) {
        let Some(space) = self.unreferenced.take() else { return };
        let bits = image.cluster_size().bits();
        let device = image.device;
        let discard = |run: &ClusterRun| Request::discard(device, run.start.0 << bits, run.count << bits);
        let mut requests: Vec<Request> = space.reused.iter().map(discard).collect();
        if space.length < image.file_length {
            requests.push(Request::set_length(device, space.length));
        }
        requests.push(Request::flush(device));
        if requests.chunks_mut(BATCH).all(|batch| io.submit(batch).is_ok()) {
            image.file_length = space.length;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_guest_sdk::abi::DEVICE_OUTPUT;
    use instar_guest_sdk::memory::{Change, MemoryDevices};
    use instar_qcow2_testkit::builder::{Spec, State};

    /// Refcounts of 64 bits: a block describes 64 clusters of 512 bytes, so that a hundred new ones need another one.
    fn parts() -> (MemoryDevices, Image, OrderedWriter, Space) {
        let (io, image) = open(&Spec { refcount_order: 6, ..Spec::new(9, 300 << 9) }.with([(3, State::Data(1))]));
        let (out, space) = (OrderedWriter::new(image.device), Space::new(&image));
        (io, image, out, space)
    }

    fn refcounts(io: &mut MemoryDevices, image: &Image, clusters: &[HostCluster]) -> Vec<u64> {
        let mut refcounts = Refcounts::new(image);
        refcounts.load(io, image, clusters.iter().copied()).unwrap();
        clusters.iter().map(|&cluster| refcounts.get(image, cluster).unwrap()).collect()
    }

    #[test]
    fn new_clusters_count_once_they_are_published() {
        let (mut io, mut image, mut out, mut space) = parts();
        let before = image.file_length;
        let mut reserved = space.reserve(&mut io, &mut image, &mut out, 100).unwrap();
        assert_eq!(reserved.stale().count(), 0);
        let clusters: Vec<HostCluster> = (0..100).map(|_| reserved.next().unwrap()).collect();
        assert!(reserved.next().is_err());
        assert!(clusters.iter().all(|cluster| cluster.0 >= before >> 9));
        assert_eq!(refcounts(&mut io, &image, &clusters), [0; 100]);
        assert_eq!(space.publish(&mut io, &mut image, &mut out).unwrap(), []);
        assert_eq!(refcounts(&mut io, &image, &clusters), [1; 100]);
        // Blocks are durable before the table refers to them, and that is durable, too.
        let table = image.header.refcount_table.0;
        let kinds = io.log.iter().filter_map(|change| match change {
            Change::Write { offset, .. } => Some(if (table..table + 512).contains(offset) { 't' } else { 'b' }),
            Change::Flush { .. } => Some('f'),
            Change::SetLength { .. } => None,
        });
        let mut kinds: Vec<char> = kinds.collect();
        kinds.dedup();
        assert_eq!(kinds, ['b', 'f', 't', 'f']);
    }

    #[test]
    fn what_nothing_refers_to_is_given_back() {
        let (mut io, mut image, mut out, mut space) = parts();
        let before = image.file_length;
        space.reserve(&mut io, &mut image, &mut out, 5).unwrap();
        assert!(io.files[&DEVICE_OUTPUT].len() as u64 > before);
        space.give_back(&mut io, &mut image);
        assert_eq!((image.file_length, io.files[&DEVICE_OUTPUT].len() as u64), (before, before));
        // Where the table refers to a new block, the file has to stay as long as it is.
        let (mut io, mut image, mut out, mut space) = parts();
        space.reserve(&mut io, &mut image, &mut out, 100).unwrap();
        space.publish(&mut io, &mut image, &mut out).unwrap();
        let length = image.file_length;
        space.give_back(&mut io, &mut image);
        assert_eq!((image.file_length, io.files[&DEVICE_OUTPUT].len() as u64), (length, length));
    }

    #[test]
    fn a_run_follows_the_blocks_that_describe_it() {
        let (mut io, mut image, mut out, mut space) = parts();
        let first = space.reserve_run(&mut io, &mut image, &mut out, 70).unwrap();
        space.publish(&mut io, &mut image, &mut out).unwrap();
        let run: Vec<HostCluster> = (first.0..first.0 + 70).map(HostCluster).collect();
        assert_eq!(refcounts(&mut io, &image, &run), [1; 70]);
        space.release(&mut io, &image, &mut out, run.clone()).unwrap();
        assert!(out.is_unflushed());
        assert_eq!(refcounts(&mut io, &image, &run), [0; 70]);
        assert!(space.release(&mut io, &image, &mut out, run).is_err());
    }
}
