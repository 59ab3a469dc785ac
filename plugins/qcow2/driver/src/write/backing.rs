//! An open backing: what planning looks at, and what writing changes.

use crate::image::Image;
use crate::metadata::mapping::Mapping;
use crate::read::compressed::CompressedReader;
use crate::refcount::space::{Reserved, Space, BATCH};
use crate::write::cluster_extent::ClusterExtent;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, OrderedWriter};
use instar_qcow2_format::{GuestCluster, HostCluster};

/// The image that data goes into, in parts that know nothing of each other.
pub(crate) struct Backing {
    pub(crate) image: Image,
    /// Whether there is anything below it.
    pub(crate) has_backing: bool,
    /// Whether what arrives is compressed.
    pub(crate) compresses: bool,
    /// What writes to its device, and knows whether a flush is due.
    pub(crate) out: OrderedWriter,
    /// The same of the data file, if there is one.
    pub(crate) data_out: OrderedWriter,
    pub(crate) mapping: Mapping,
    pub(crate) space: Space,
    pub(crate) compressed: CompressedReader,
    /// Length of the file in bytes before the commit.
    opened_length: u64,
}

impl Backing {
    pub(crate) fn new(image: Image, has_backing: bool) -> Self {
        Self {
            mapping: Mapping::new(&image),
            space: Space::new(&image),
            compressed: CompressedReader::default(),
            out: OrderedWriter::new(image.device),
            data_out: OrderedWriter::new(image.data_device()),
            opened_length: image.file_length,
            has_backing,
            compresses: false,
            image,
        }
    }

    /// Load the mapping of these extents: see [`Mapping::load`].
    pub(crate) fn load_mapping(&mut self, io: &mut dyn BlockIo, extents: &[ClusterExtent]) -> DriverResult<()> {
        self.mapping.load(io, &self.image, extents.iter().map(|extent| extent.cluster))
    }

    /// Flush, if anything was written since the last flush.
    pub(crate) fn flush(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.data_out.barrier(io)?;
        self.out.barrier(io)
    }

    /// Make the file as long as its last cluster, if bytes of that up to `end` are not in it. A file may end behind the last
    /// subcluster that holds data ("Extended L2 Entries"), and within a cluster that only reads as zeroes.
    pub(crate) fn hold_last_cluster(&mut self, io: &mut dyn BlockIo, end: u64) -> DriverResult<()> {
        let image = &mut self.image;
        if end <= image.file_length || image.fixed_length {
            return Ok(());
        }
        image.file_length = image.clustered_length().min(image.max_length).max(end);
        self.out.set_length(io, self.image.file_length)
    }

    /// What writes the guest's clusters: to this file, or to the data file.
    pub(crate) fn data_out(&mut self) -> &mut OrderedWriter {
        if self.image.data.is_some() {
            &mut self.data_out
        } else {
            &mut self.out
        }
    }

    /// The guest's clusters are about to be written, up to byte `end` of the file that holds them.
    pub(crate) fn writes_data(&mut self, end: u64) {
        if let Some(data) = &mut self.image.data {
            data.wrote(end);
        }
        self.data_out().written();
    }

    /// Nothing refers to these clusters of the data file any more, durably: give their space back. Nothing depends on it.
    pub(crate) fn punch(&mut self, io: &mut dyn BlockIo, clusters: &[GuestCluster]) -> DriverResult<()> {
        let Some(data) = self.image.data else { return Ok(()) };
        let mut requests: Vec<Request> = Vec::new();
        for &cluster in clusters {
            let at = cluster.0 << self.image.cluster_size().bits();
            let length = data.held(at, self.image.visible_bytes(cluster));
            match requests.last_mut() {
                _ if length == 0 => {}
                Some(last) if last.offset + last.length == at => last.length += length,
                _ => requests.push(Request::discard(data.device, at, length)),
            }
        }
        requests.chunks_mut(BATCH).try_for_each(|requests| self.data_out.run(io, requests))
    }

    /// Write a small field at byte `at`, durably.
    pub(crate) fn write_field(&self, io: &mut dyn BlockIo, at: u64, bytes: &[u8]) -> DriverResult<()> {
        io.write(self.image.device, at, bytes)?;
        io.flush(self.image.device)
    }

    /// See [`Space::reserve`].
    pub(crate) fn reserve(&mut self, io: &mut dyn BlockIo, count: u64) -> DriverResult<Reserved> {
        self.space.reserve(io, &mut self.image, &mut self.out, count)
    }

    /// See [`Space::reserve_run`].
    pub(crate) fn reserve_run(&mut self, io: &mut dyn BlockIo, count: u64) -> DriverResult<HostCluster> {
        self.space.reserve_run(io, &mut self.image, &mut self.out, count)
    }

    /// New clusters count from here on: see [`publish`](crate::refcount::publish). Durable when it returns, but for the
    /// release of a refcount table that was replaced, which need not be.
    pub(crate) fn publish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let replaced = self.space.publish(io, &mut self.image, &mut self.out)?;
        self.release(io, replaced)
    }

    /// See [`Space::release`].
    pub(crate) fn release(&mut self, io: &mut dyn BlockIo, clusters: Vec<HostCluster>) -> DriverResult<()> {
        self.space.release(io, &self.image, &mut self.out, clusters)
    }

    /// Zero new clusters, those of `stale`, which are ascending runs for the most part.
    pub(crate) fn zero_clusters(&mut self, io: &mut dyn BlockIo, stale: &[HostCluster]) -> DriverResult<()> {
        let bytes = self.image.cluster_size().bytes();
        let mut requests: Vec<Request> = Vec::new();
        for &cluster in stale {
            let at = self.image.host_offset(cluster)?.0;
            match requests.last_mut() {
                Some(last) if last.offset + last.length == at => last.length += bytes,
                _ => requests.push(Request::zero(self.image.device, at, bytes)),
            }
        }
        requests.chunks_mut(BATCH).try_for_each(|requests| self.out.run(io, requests))
    }

    /// A write failed for want of space: give back what was allocated in vain, and say how much longer the file is.
    pub(crate) fn disk_is_full(&mut self, io: &mut dyn BlockIo, mut error: DriverError) -> DriverError {
        self.space.give_back(io, &mut self.image);
        let grown = self.image.file_length.saturating_sub(self.opened_length);
        if grown > 0 {
            error.text = format!(
                "{}; the file is {grown} bytes longer than before, which the next writes into the image will use",
                error.text
            );
        }
        error
    }
}
