//! The sink role: allocate at the end of the file, write, and refer to what was written once it is durable.
//!
//! Some clusters at a time, in three steps with a flush behind each: data, L2 entries, L1 entries. Whatever of the writes
//! since the last flush is on disk after a crash, every entry points to what it should; at worst, space is lost.

use crate::header::AUTOCLEAR;
use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageInfo, PlanSummary, Request};
use instar_guest_sdk::{checked_end, Batch, BlockIo, DriverError, DriverResult, Extent, ReadBelow, Sink};

/// What surrounds a partial write in a new cluster is read from below in pieces of at most this many bytes.
const FILL: u64 = 1 << 20;
/// Clusters that are written between two flushes, at most: each may touch a piece of a table of its own.
const CLUSTERS: usize = 1024;

/// An image that data goes into.
pub struct QedSink {
    image: Image,
    file_length: u64,
    max_length: u64,
    verified: bool,
    /// New clusters and tables, and the last guest cluster and L1 index that were counted.
    planned: (u64, u64),
    last: (Option<u64>, Option<u64>),
    /// Requests that are not executed, and places of entries that are changed in memory only.
    data: Batch,
    l1: Vec<u64>,
    l2: Vec<u64>,
}

fn full() -> DriverError {
    DriverError::new(ErrorCode::NoSpace, "the file may not become as long as it would have to")
}

impl QedSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        let (file_length, max_length) = (device.file_length, device.max_length);
        let (verified, planned, last, data, l1, l2) = Default::default();
        Self { image, file_length, max_length, verified, planned, last, data, l1, l2 }
    }

    /// Whether a part needs no cluster: it is zeroes, in a cluster of zeroes or for a whole one.
    fn stays_zero(&self, part: &Extent, entry: u64) -> bool {
        let visible = self.image.header.cluster_size.min(self.image.header.image_size - part.guest_offset);
        let whole = part.guest_offset.is_multiple_of(self.image.header.cluster_size) && part.length == visible;
        part.is_zero() && entry <= 1 && (entry == 1 || whole)
    }

    /// Space at the end of the file, which reads as zeroes.
    fn allocate(&mut self, length: u64) -> DriverResult<u64> {
        let start = self.image.end;
        self.image.end = checked_end(start, length, self.max_length).ok_or_else(full)?;
        Ok(start)
    }

    /// Where the L2 entry of a guest offset stands; a table is made for it if it has none.
    fn entry_at(&mut self, io: &mut dyn BlockIo, guest: u64) -> DriverResult<u64> {
        let header = self.image.header;
        let (index, within) = (guest / header.coverage(), guest % header.coverage() / header.cluster_size * 8);
        if let Some(table) = self.image.table(io, index)? {
            return Ok(table + within);
        }
        let table = self.allocate(header.table_bytes)?;
        self.image.set_entry(header.l1_table + index * 8, table);
        self.l1.push(header.l1_table + index * 8);
        Ok(table + within)
    }

    /// Step 1 for a part of a cluster.
    fn prepare(&mut self, io: &mut dyn BlockIo, part: &Extent, below: &mut dyn ReadBelow) -> DriverResult<()> {
        let (device, size, guest) = (self.image.device, self.image.header.cluster_size, part.guest_offset);
        let entry = self.entry_at(io, guest)?;
        let mut offset = self.image.cluster(io, entry)?;
        if self.stays_zero(part, offset) {
            self.image.set_entry(entry, 1);
            self.l2.push(entry);
            return Ok(());
        }
        if offset <= 1 {
            let was_zero = core::mem::replace(&mut offset, self.allocate(size)?) == 1;
            let start = guest - guest % size;
            let end = (start + size).min(self.image.header.image_size);
            for (mut at, to) in [(start, guest), (guest + part.length, end)] {
                while !was_zero && below.exists() && at < to {
                    let mut bytes = vec![0; FILL.min(to - at) as usize];
                    below.read(io, at, &mut bytes)?;
                    io.write(device, offset + (at - start), &bytes)?;
                    at += bytes.len() as u64;
                }
            }
            self.image.set_entry(entry, offset);
            self.l2.push(entry);
        }
        let to = offset + guest % size;
        self.data.push(part.request(device, to)?);
        Ok(())
    }

    /// All three steps for what was prepared.
    fn step(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let device = self.image.device;
        self.data.push(Request::set_length(device, self.image.end));
        self.data.submit(io)?;
        for entries in [&mut self.l2, &mut self.l1] {
            io.flush(device)?;
            self.image.write_entries(io, entries)?;
        }
        io.flush(device)?;
        self.image.shrink();
        Ok(())
    }
}

impl Sink for QedSink {
    fn info(&self) -> ImageInfo {
        self.image.info()
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        if !core::mem::replace(&mut self.verified, true) {
            self.image.verify(io)?;
        }
        let header = self.image.header;
        for extent in extents {
            for part in extent.blocks(header.cluster_size)? {
                self.image.shrink();
                let (cluster, index) = (part.guest_offset / header.cluster_size, part.guest_offset / header.coverage());
                let table = self.image.table(io, index)?;
                let entry = table.map(|table| self.image.cluster(io, table + cluster % header.entries() * 8));
                let entry = entry.transpose()?.unwrap_or(0);
                self.planned.1 += u64::from(table.is_none() && self.last.1.replace(index) != Some(index));
                if entry <= 1 && !self.stays_zero(&part, entry) {
                    self.planned.0 += u64::from(self.last.0.replace(cluster) != Some(cluster));
                }
            }
        }
        Ok(())
    }

    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let ((clusters, tables), header) = (self.planned, self.image.header);
        // All tables are verified: what the last cluster lacks to be whole is nobody's either.
        self.image.end = self.file_length.next_multiple_of(header.cluster_size);
        let bytes = clusters.checked_mul(header.cluster_size).zip(tables.checked_mul(header.table_bytes));
        let length = bytes.and_then(|(data, tables)| self.image.end.checked_add(data)?.checked_add(tables));
        Ok(PlanSummary {
            final_length: length.filter(|&length| length <= self.max_length).ok_or_else(full)?,
            new_data_clusters: clusters,
            new_metadata_clusters: tables * (header.table_bytes / header.cluster_size),
            ..PlanSummary::default()
        })
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if core::mem::take(&mut self.image.header.autoclear) != 0 {
            io.write(self.image.device, AUTOCLEAR, &[0; 8])?;
            io.flush(self.image.device)?;
        }
        for extent in extents {
            for part in extent.blocks(self.image.header.cluster_size)? {
                self.prepare(io, &part, below)?;
                if self.l2.len().max(self.data.len()) >= CLUSTERS {
                    self.step(io)?;
                }
            }
        }
        self.step(io)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        io.flush(self.image.device)
    }
}
