//! Reading compressed clusters.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult};
use instar_qcow_format::{Inflater, SECTOR};

/// Bytes that are read at once where streams follow each other in the file, if that is no great part of the heap: every image
/// of a chain may hold so much.
const READ_AHEAD: u64 = 1 << 20;
/// See [`READ_AHEAD`].
const PART_OF_HEAP: u64 = 32;

/// Decodes the clusters of one image; keeps the last one, and what was read ahead.
#[derive(Debug, Default)]
pub struct ClusterReader {
    inflater: Option<Inflater>,
    input: Vec<u8>,
    input_at: u64,
    cluster: Vec<u8>,
    held: Option<(u64, u64)>,
}

impl ClusterReader {
    /// The cluster whose stream has `length` bytes at byte `offset` of the file.
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] if the stream does not decode to a cluster; I/O errors.
    pub fn cluster(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (offset, length): (u64, u64),
    ) -> DriverResult<&[u8]> {
        if self.held != Some((offset, length)) {
            self.held = None;
            let size = usize::try_from(image.header.cluster_size()).map_err(|_| overflow("the cluster size"))?;
            let mut cluster = core::mem::take(&mut self.cluster);
            cluster.resize(size, 0);
            let mut inflater = self.inflater.take().unwrap_or_default();
            let stream = self.load(io, image, (offset, length))?;
            let decoded = inflater.decode(stream, &mut cluster);
            (self.cluster, self.inflater) = (cluster, Some(inflater));
            let failed = |why| DriverError::new(ErrorCode::ParseFailed, alloc::format!("a compressed cluster {why}"));
            decoded.map_err(|why| failed(why).at(image.device, offset))?;
            self.held = Some((offset, length));
        }
        Ok(&self.cluster)
    }

    fn load(&mut self, io: &mut dyn BlockIo, image: &Image, (offset, length): (u64, u64)) -> DriverResult<&[u8]> {
        let held_end = self.input_at + self.input.len() as u64;
        let end = offset.checked_add(length).ok_or_else(|| overflow("a compressed cluster"))?;
        if offset < self.input_at || end > held_end {
            let ahead = READ_AHEAD.min(io.heap_free() as u64 / PART_OF_HEAP).max(SECTOR);
            let to = offset.saturating_add(ahead).min(image.file_length).max(end);
            let count = usize::try_from(to - offset).map_err(|_| overflow("a compressed cluster"))?;
            // The old one goes first.
            self.input = Vec::new();
            let mut input = vec![0; count];
            io.read(image.device, offset, &mut input)?;
            (self.input, self.input_at) = (input, offset);
        }
        let start = usize::try_from(offset - self.input_at).map_err(|_| overflow("a compressed cluster"))?;
        let count = usize::try_from(length).map_err(|_| overflow("a compressed cluster"))?;
        self.input.get(start..start.saturating_add(count)).ok_or_else(|| overflow("a compressed cluster"))
    }

    /// Drop what was read: the file is another one now.
    pub fn forget(&mut self) {
        (self.input, self.held) = (Vec::new(), None);
    }
}
