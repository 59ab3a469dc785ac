//! Reading compressed clusters.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DecodeAhead, Decoder, DriverError, DriverResult, LastCluster};
use instar_qcow_format::{Inflater, SECTOR};

/// Bytes that are read at once where streams follow each other in the file, if that is no great part of the heap: every image
/// of a chain may hold so much.
const READ_AHEAD: u64 = 1 << 20;
/// See [`READ_AHEAD`].
const PART_OF_HEAP: u64 = 32;

/// Decodes the clusters of one image; keeps the last one, what was read ahead, and the clusters that come [next](DecodeAhead).
#[derive(Debug, Default)]
pub struct ClusterReader {
    ahead: DecodeAhead<ClusterDecoder>,
    input: Vec<u8>,
    input_at: u64,
    last: LastCluster<(u64, u64)>,
}

/// Decodes clusters with memory of its own.
#[derive(Default)]
struct ClusterDecoder(Inflater);

impl Decoder for ClusterDecoder {
    fn decode(&mut self, _: u64, stream: &[u8], cluster: &mut [u8]) -> bool {
        self.0.decode(stream, cluster).is_ok()
    }
}

impl ClusterReader {
    /// An enumeration begins at guest byte `from`: its clusters will be asked for in this order, if at all.
    pub fn enumerate(&mut self, from: u64) {
        self.ahead.enumerate(from);
    }

    /// The next compressed cluster of the enumeration, whose stream has `length` bytes at byte `offset` of the file.
    pub fn note(&mut self, guest: u64, (offset, length): (u64, u64)) {
        self.ahead.note(guest, offset, offset..offset.saturating_add(length));
    }

    /// Fill `buffer` with the bytes from `start` on of the cluster at guest offset `guest`, whose stream has `length` bytes at byte
    /// `offset` of the file.
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] if the stream does not decode to a cluster; I/O errors.
    pub fn read(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (guest, stream): (u64, (u64, u64)),
        start: u64,
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        let size = usize::try_from(image.header.cluster_size()).map_err(|_| overflow("the cluster size"))?;
        let mut last = core::mem::take(&mut self.last);
        let read = last.read(stream, size, start, buffer, |cluster| self.decode(io, image, (guest, stream), cluster));
        self.last = last;
        read
    }

    /// Decode a whole cluster.
    fn decode(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (guest, (offset, length)): (u64, (u64, u64)),
        cluster: &mut [u8],
    ) -> DriverResult<()> {
        if self.ahead.take(io, image.device, (guest, offset), cluster, &ClusterDecoder::default)? {
            return Ok(());
        }
        let range = self.load(io, image, (offset, length))?;
        let stream = self.input.get(range).ok_or_else(|| overflow("a compressed cluster"))?;
        let decoder = self.ahead.own(io, &ClusterDecoder::default).ok_or_else(|| overflow("a decoder"))?;
        let decoded = decoder.0.decode(stream, cluster);
        let failed = |why| DriverError::new(ErrorCode::ParseFailed, alloc::format!("a compressed cluster {why}"));
        decoded.map_err(|why| failed(why).at(image.device, offset))
    }

    /// Have a stream in memory; returns where it stands in `input`.
    fn load(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (offset, length): (u64, u64),
    ) -> DriverResult<Range<usize>> {
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
        Ok(start..start.saturating_add(count))
    }

    /// Drop what was read: the file is another one now.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}
