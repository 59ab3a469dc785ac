//! The clusters of an image that is changed: new ones are reserved, then [published](Space::publish), then referred to; those
//! that nothing refers to any more are released.

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
    /// So many of them, the first ones, hold whatever was there before.
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

    /// One reference less to each of these clusters, which nothing refers to any more. Nothing depends on it: it is durable
    /// with the next flush, and a crash before that leaves leaks.
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
