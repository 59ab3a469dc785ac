//! The data of clusters, on its way into the file.

use crate::batch::Batch;
use crate::error::{overflow, DriverResult};
use crate::extent::Extent;
use crate::io::BlockIo;
use crate::ordered::OrderedWriter;
use crate::traits::ReadBelow;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::Request;

/// Requests that are collected before they are submitted.
const REQUESTS: usize = 4096;
/// Bytes that are collected before they are written: what was read from below, or decoded.
const BYTES: usize = 4 << 20;
/// Bytes that are read from below at once.
const CHUNK: u64 = 1 << 20;

/// The place of a cluster: the guest bytes that it holds, and its offset in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterPlace {
    /// Its guest bytes, as far as the disk goes.
    pub guest: Range<u64>,
    /// The byte of the file at which it begins.
    pub offset: u64,
    /// Whether it was just allocated, so that its space reads as zeroes.
    pub is_new: bool,
}

impl ClusterPlace {
    /// Where guest byte `at` of the cluster stands in the file.
    fn offset_of(&self, at: u64) -> DriverResult<u64> {
        let within = at.checked_sub(self.guest.start).and_then(|within| self.offset.checked_add(within));
        within.ok_or_else(|| overflow("a place in a cluster"))
    }
}

/// Requests that were not submitted yet, and the bytes that they write.
///
/// 5 MiB of memory at most, and besides what is [pushed](ClusterData::push_bytes) at once.
#[derive(Debug, Default)]
pub struct ClusterData {
    requests: Batch,
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

impl ClusterData {
    /// Add a request behind the others. The buffer that it names lives until [`ClusterData::submit`] returns.
    pub fn push(&mut self, request: Request) {
        self.requests.push(request);
    }

    /// Write these bytes to byte `offset` of `device`.
    pub fn push_bytes(&mut self, device: u32, offset: u64, bytes: Vec<u8>) {
        self.push(Request::write(device, offset, bytes.as_ptr() as u64, bytes.len() as u64));
        self.bytes = self.bytes.saturating_add(bytes.len());
        self.buffers.push(bytes);
    }

    /// Write parts of extents into a cluster. One that is new reads as zeroes already, so that zeroes need not be written.
    ///
    /// # Errors
    /// I/O errors; [`InternalOverflow`](instar_guest_abi::ErrorCode::InternalOverflow) for a part in front of the cluster, or
    /// one that is not decoded.
    pub fn write_parts(
        &mut self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        place: &ClusterPlace,
        parts: &[Extent],
    ) -> DriverResult<()> {
        for part in parts.iter().filter(|part| !(place.is_new && part.is_zero())) {
            self.push(part.request(out.device(), place.offset_of(part.guest_offset)?)?);
            self.submit_if_full(io, out)?;
        }
        Ok(())
    }

    /// Fill a new cluster up around `parts` with what shows from below, which is read as far as it goes.
    ///
    /// # Errors
    /// As [`ClusterData::write_parts`]; those of `below`.
    pub fn fill_around(
        &mut self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        place: &ClusterPlace,
        parts: &[Extent],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let mut at = place.guest.start;
        for part in parts.iter().chain([&Extent::zero(place.guest.end, 0)]) {
            let gap_end = part.guest_offset.min(below.length());
            while at < gap_end {
                let length = CHUNK.min(gap_end - at);
                let mut buffer = vec![0; usize::try_from(length).map_err(|_| overflow("a cluster"))?];
                below.read(io, at, &mut buffer)?;
                if buffer.iter().any(|&byte| byte != 0) {
                    self.push_bytes(out.device(), place.offset_of(at)?, buffer);
                }
                self.submit_if_full(io, out)?;
                at += length;
            }
            at = part.end();
        }
        Ok(())
    }

    /// Submit everything, if so much was collected that it is time.
    ///
    /// # Errors
    /// I/O errors.
    pub fn submit_if_full(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        if self.requests.len() >= REQUESTS || self.bytes >= BYTES {
            self.submit(io, out)?;
        }
        Ok(())
    }

    /// Submit everything: what it is read from need not stay where it is any more. It is not durable when this returns.
    ///
    /// # Errors
    /// I/O errors.
    pub fn submit(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        self.requests.submit_to(io, out)?;
        *self = Self::default();
        Ok(())
    }
}
