//! Writing clusters: data in place and into new clusters, then the L2 entries, then the L1 entries.
//!
//! The order, and what a crash leaves:
//! 1. data. In place it is hidden by the overlay; new clusters, and the zeroes of new L2 tables, lie where no entry points to;
//! 2. *flush*; then L2 entries, each of which is there or not. Those of old tables point to clusters that are durable, with
//!    the file as long as they need; new tables nothing refers to;
//! 3. *flush*; then L1 entries, which point to new tables that are durable with all their entries.
//!
//! Whatever subset of the writes since the last flush is on the disk, every entry points to what it should. At worst clusters
//! are lost behind the last one that is used, where the next run finds them free.
//!
//! A compressed cluster is never changed in its place: its neighbors may begin in the same sector. Its entry gets a new
//! cluster, and its stream is lost space from then on, as in QEMU.

use crate::changes::Changes;
use crate::decide::{decide, Action};
use crate::decode::ClusterReader;
use crate::image::Image;
use crate::parts::{ClusterParts, Shape};
use crate::window::Window;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverError, DriverResult, Extent, OrderedWriter, ReadBelow};
use instar_qcow_format::{Entry, ENTRY_BYTES};

/// Requests that are collected before they are submitted.
const BATCH: usize = 4096;
/// Bytes from below, or decoded, that are collected before they are written.
const FILL_BYTES: usize = 4 << 20;

/// Requests that were not submitted yet, and the bytes that they write.
#[derive(Debug, Default)]
struct Pending {
    requests: Batch,
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// An image that is written to.
#[derive(Debug)]
pub struct Writer {
    pub image: Image,
    pub out: OrderedWriter,
    /// Where the next cluster is put: a multiple of a cluster. Behind it nothing is used.
    pub end: u64,
    /// The device cannot change its length.
    pub fixed: bool,
    l1: Window,
    l2: Window,
    l1_changes: Changes,
    l2_changes: Changes,
    reader: ClusterReader,
    pending: Pending,
}

impl Writer {
    pub fn new(image: Image, fixed: bool) -> Self {
        let out = OrderedWriter::new(image.device);
        let (l1, l2) = (Window::new(0), Window::new(0));
        let (l1_changes, l2_changes, reader, pending) = Default::default();
        Self { image, out, end: 0, fixed, l1, l2, l1_changes, l2_changes, reader, pending }
    }

    /// The L2 table with this index, if there is one.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn table(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<Option<u64>> {
        let at = self.image.l1_place(index);
        if let Some(number) = self.l1_changes.get(at) {
            // Our own may lie behind the end that the file has by now.
            return Ok((number != 0).then_some(number));
        }
        let number = self.l1.get(io, &self.image, at, self.image.header.l1_range().end)?;
        if number == 0 {
            return Ok(None);
        }
        self.image.table(number).map(Some).map_err(|text| self.image.corrupt(at, text))
    }

    /// The entry of a guest cluster in its table.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn entry(&mut self, io: &mut dyn BlockIo, table: u64, cluster: u64) -> DriverResult<Entry> {
        let at = self.image.l2_place(table, cluster);
        if let Some(number) = self.l2_changes.get(at) {
            return Ok(Entry::decode(number, self.image.header.cluster_bits));
        }
        let number = self.l2.get(io, &self.image, at, table.saturating_add(self.image.header.table_bytes()))?;
        self.image.entry(number).map_err(|text| self.image.corrupt(at, text))
    }

    /// What the image says of a guest cluster.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn lookup(&mut self, io: &mut dyn BlockIo, cluster: u64) -> DriverResult<Entry> {
        match self.table(io, cluster >> self.image.header.l2_bits)? {
            Some(table) => self.entry(io, table, cluster),
            None => Ok(Entry::Free),
        }
    }

    /// Bytes at the end of what is used, from the start of a cluster on.
    ///
    /// # Errors
    /// `NoSpace` where no file reaches.
    pub fn take(&mut self, length: u64) -> DriverResult<u64> {
        let start = self.end;
        let end =
            start.checked_add(length).and_then(|end| end.checked_next_multiple_of(self.image.header.cluster_size()));
        self.end = end.filter(|&end| end <= i64::MAX as u64).ok_or_else(|| {
            DriverError::new(ErrorCode::NoSpace, "the file would end behind byte 2^63").at(self.image.device, start)
        })?;
        Ok(start)
    }

    /// Have bytes that were taken read as zeroes: past the end of the file they do already.
    pub fn clear(&mut self, offset: u64, length: u64) {
        if offset < self.image.file_length {
            self.pending.requests.push(Request::zero(self.image.device, offset, length));
        }
    }

    /// The table of a guest cluster, made if it is not there: its zeroes are durable before anything refers to it.
    fn make_table(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<u64> {
        if let Some(table) = self.table(io, index)? {
            return Ok(table);
        }
        let length = self.image.header.table_bytes();
        let table = self.take(length)?;
        if table < self.image.file_length {
            // Its entries are read before the next step.
            self.clear(table, length);
            self.submit(io)?;
            self.l2.forget();
        }
        self.l1_changes.set(&self.l1, self.image.l1_place(index), table)?;
        Ok(table)
    }

    /// Write what arrives for a cluster. Its data is submitted by [`Writer::submit`], its entry written by [`Writer::step`].
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn write_cluster(
        &mut self,
        io: &mut dyn BlockIo,
        disk: Shape,
        arriving: &ClusterParts,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (cluster, range) = (arriving.cluster, disk.range(arriving.cluster));
        let index = range.start / disk.coverage;
        let entry = self.lookup(io, cluster)?;
        let shows = below.exists() && range.start < below.length();
        let action = decide(entry, arriving.arrival(disk), shows);
        let offset = match action {
            Action::Nothing => return Ok(()),
            Action::InPlace(offset) => offset,
            Action::Allocate | Action::Unpack { .. } => self.new_cluster(io, index, cluster)?,
        };
        match action {
            Action::Allocate if shows && entry == Entry::Free => {
                let mut at = range.start;
                let end = Extent::zero(range.end, 0);
                for part in arriving.parts.iter().chain([&end]) {
                    self.fill(io, (at, part.guest_offset), offset + (at - range.start), below)?;
                    at = part.end();
                }
            }
            Action::Unpack { offset: stream, length } => {
                let bytes = self.reader.cluster(io, &self.image, (stream, length))?.to_vec();
                self.push_bytes(offset, bytes);
            }
            _ => {}
        }
        let is_new = !matches!(action, Action::InPlace(_) | Action::Unpack { .. });
        for part in &arriving.parts {
            // A new cluster reads as zeroes.
            if !(is_new && part.is_zero()) {
                let to = offset + (part.guest_offset - range.start);
                self.pending.requests.push(part.request(self.image.device, to)?);
            }
        }
        self.submit_if_full(io)?;
        if self.l1_changes.is_full() || self.l2_changes.is_full() {
            self.step(io)?;
        }
        Ok(())
    }

    /// A cluster at the end of what is used, which reads as zeroes, and the entry for it.
    fn new_cluster(&mut self, io: &mut dyn BlockIo, index: u64, cluster: u64) -> DriverResult<u64> {
        let table = self.make_table(io, index)?;
        let place = self.image.l2_place(table, cluster);
        if self.l2_changes.get(place).is_none() {
            // The window is to hold the sector around it.
            self.l2.get(io, &self.image, place, table.saturating_add(self.image.header.table_bytes()))?;
        }
        let size = self.image.header.cluster_size();
        let offset = self.take(size)?;
        self.clear(offset, size);
        self.l2_changes.set(&self.l2, place, offset)?;
        Ok(offset)
    }

    fn push_bytes(&mut self, offset: u64, bytes: Vec<u8>) {
        let (address, length) = (bytes.as_ptr() as u64, bytes.len());
        self.pending.requests.push(Request::write(self.image.device, offset, address, length as u64));
        self.pending.bytes += length;
        self.pending.buffers.push(bytes);
    }

    /// Write what shows from below at guest bytes `from..to` to byte `offset` of the file, which reads as zeroes.
    fn fill(
        &mut self,
        io: &mut dyn BlockIo,
        (from, to): (u64, u64),
        offset: u64,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let length = to.min(below.length()).saturating_sub(from);
        if length > 0 {
            let mut buffer = vec![0; usize::try_from(length).map_err(|_| overflow("a cluster"))?];
            below.read(io, from, &mut buffer)?;
            if buffer.iter().any(|&byte| byte != 0) {
                self.push_bytes(offset, buffer);
            }
        }
        Ok(())
    }

    fn submit_if_full(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.pending.requests.len() >= BATCH || self.pending.bytes >= FILL_BYTES {
            self.submit(io)?;
        }
        Ok(())
    }

    /// Submit the data of the clusters so far: what it is read from need not stay where it is any more.
    ///
    /// # Errors
    /// I/O errors.
    pub fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.pending.requests.submit_to(io, &mut self.out)?;
        self.pending = Pending::default();
        Ok(())
    }

    /// Have the file reach to the end of its last cluster: another program puts the next one behind the file's end.
    ///
    /// # Errors
    /// I/O errors.
    pub fn lengthen(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if !self.fixed && self.end > self.image.file_length {
            self.out.set_length(io, self.end)?;
            self.image.file_length = self.end;
        }
        Ok(())
    }

    /// Steps 2 and 3 for the clusters so far. The last of the entries are not flushed: the next step does that, or
    /// [`Writer::finish`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn step(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.submit(io)?;
        if self.l2_changes.is_empty() && self.l1_changes.is_empty() {
            return Ok(());
        }
        self.lengthen(io)?;
        for changes in [&mut self.l2_changes, &mut self.l1_changes] {
            if !changes.is_empty() {
                self.out.barrier(io)?;
                changes.write(io, &mut self.out)?;
            }
        }
        self.forget();
        Ok(())
    }

    /// Drop what was read of the file: it is another one now.
    pub fn forget(&mut self) {
        self.l1.forget();
        self.l2.forget();
        self.reader.forget();
    }

    /// Make everything durable.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.step(io)?;
        self.out.barrier(io)
    }
}

/// Bytes of an L1 table with so many entries.
pub const fn l1_bytes(entries: u64) -> u64 {
    entries.saturating_mul(ENTRY_BYTES)
}
