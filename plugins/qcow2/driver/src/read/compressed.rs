//! Reading compressed clusters.
//!
//! Writers put them one after the other, so where two follow each other in the file, more than the second is read
//! ahead. The last cluster that was read in parts is kept, because the next read usually wants the next part.

use crate::image::{overflow, Image};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DecodeAhead, Decoder, DriverError, DriverResult, LastCluster};
use instar_qcow2_format::{CompressedRange, Decompressor, GuestCluster};

/// Bytes that are read at once where clusters follow each other in the file.
const READ_AHEAD: u64 = 1 << 20;

/// Reads the compressed clusters of one image. Its memory: one cluster, its stream or [`READ_AHEAD`], what the decoder needs, and
/// the clusters that come [next](DecodeAhead).
#[derive(Default)]
pub struct CompressedReader {
    ahead: DecodeAhead<ClusterDecoder>,
    /// Bytes of the file from `input_at` on; the first `input_length` of them are valid.
    input: Vec<u8>,
    input_at: u64,
    input_length: u64,
    /// By its descriptor.
    last: LastCluster<u64>,
}

/// Decodes clusters with memory of its own.
struct ClusterDecoder(Decompressor);

impl Decoder for ClusterDecoder {
    fn decode(&mut self, _: u64, stream: &[u8], cluster: &mut [u8]) -> bool {
        self.0.decompress(stream, cluster).is_ok()
    }

    fn has_memory(&self) -> bool {
        self.0.has_memory()
    }
}

impl CompressedReader {
    /// An enumeration begins at guest byte `from`: its clusters will be asked for in this order, if at all.
    pub(crate) fn enumerate(&mut self, from: u64) {
        self.ahead.enumerate(from);
    }

    /// The next compressed cluster of the enumeration.
    pub(crate) fn note(&mut self, image: &Image, guest: u64, descriptor: u64) {
        let range = CompressedRange::decode(descriptor, image.cluster_size());
        self.ahead.note(guest, descriptor, range.offset.0..range.end());
    }

    /// Fill `buffer` with the bytes from `start` on of the cluster at guest offset `guest`, whose entry has this
    /// descriptor.
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] if the stream does not decode to a cluster; I/O errors.
    pub fn read(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (guest, descriptor): (u64, u64),
        start: u64,
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        let size = usize::try_from(image.cluster_size().bytes()).map_err(|_| overflow("the cluster size"))?;
        let mut last = core::mem::take(&mut self.last);
        let read =
            last.read(descriptor, size, start, buffer, |cluster| self.decode(io, image, (guest, descriptor), cluster));
        self.last = last;
        read
    }

    /// The bytes of a compressed cluster of the guest, whose entry has this descriptor.
    ///
    /// # Errors
    /// As [`CompressedReader::read`].
    pub(crate) fn read_whole(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        cluster: GuestCluster,
        descriptor: u64,
    ) -> DriverResult<Vec<u8>> {
        let size = image.cluster_size();
        let mut bytes = vec![0; usize::try_from(size.bytes()).map_err(|_| overflow("the cluster size"))?];
        self.read(io, image, (cluster.0 << size.bits(), descriptor), 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Decode a whole cluster.
    fn decode(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        (guest, descriptor): (u64, u64),
        output: &mut [u8],
    ) -> DriverResult<()> {
        let decoder = || ClusterDecoder(Decompressor::new(image.header.compression));
        if self.ahead.take(io, image.device, (guest, descriptor), output, &decoder)? {
            return Ok(());
        }
        let range = CompressedRange::decode(descriptor, image.cluster_size());
        let (start, end) = self.load(io, image, range)?;
        let stream = self.input.get(start..end).ok_or_else(|| overflow("a compressed cluster"))?;
        let decoder = self.ahead.own(io, &decoder).ok_or_else(|| overflow("a decoder"))?;
        decoder.0.decompress(stream, output).map_err(|error| {
            let text = format!("the compressed cluster of guest offset {guest} {error}");
            DriverError::new(ErrorCode::ParseFailed, text).at(image.device, range.offset.0)
        })
    }

    /// Have a range of the file in memory; returns where it stands in `input`. Past the end of the file are zeroes.
    fn load(&mut self, io: &mut dyn BlockIo, image: &Image, range: CompressedRange) -> DriverResult<(usize, usize)> {
        let held_end = self.input_at + self.input_length;
        let begins_inside = (self.input_at..=held_end).contains(&range.offset.0) && self.input_length > 0;
        if !begins_inside || range.end() > held_end {
            let ahead = if begins_inside { READ_AHEAD } else { 0 };
            // No further than the file goes, but as far as the range does.
            let end = (range.offset.0 + ahead).min(image.file_length).max(range.end());
            let length = end - range.offset.0;
            let count = usize::try_from(length).map_err(|_| overflow("a compressed cluster"))?;
            if self.input.len() < count {
                self.input = alloc::vec![0; count];
            }
            self.input_length = 0;
            io.read(image.device, range.offset.0, self.input.get_mut(..count).unwrap_or_default())?;
            (self.input_at, self.input_length) = (range.offset.0, length);
        }
        let start = usize::try_from(range.offset.0 - self.input_at).map_err(|_| overflow("a compressed cluster"))?;
        let length = usize::try_from(range.length).map_err(|_| overflow("a compressed cluster"))?;
        Ok((start, start + length))
    }
}
