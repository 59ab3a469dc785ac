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

use crate::decode::ClusterReader;
use crate::image::Image;
use alloc::vec;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::table::{
    Action, Arrival, Big64, ClusterData, ClusterParts, ClusterPlace, Disk, Held, Table, ZeroEntries,
};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter, ReadBelow};
use instar_qcow_format::{Entry, ENTRY_BYTES};

/// What is done about a cluster with this entry: a compressed one always gets a new place. `below`: something may show through
/// where the image has nothing.
pub fn decide(entry: Entry, arrival: Arrival, below: bool) -> Action<u64> {
    let held = match entry {
        Entry::Free => Held::Nothing,
        Entry::Data(offset) => Held::At(offset),
        Entry::Compressed { .. } => return Action::Allocate,
    };
    held.decide(arrival, ZeroEntries::Never, below)
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
    l1: Table<Big64>,
    l2: Table<Big64>,
    reader: ClusterReader,
    data: ClusterData,
}

impl Writer {
    pub fn new(image: Image, fixed: bool) -> Self {
        let out = OrderedWriter::new(image.device);
        let (l1, l2) = (Table::sparse(image.device, 0), Table::sparse(image.device, 0));
        let (reader, data) = Default::default();
        Self { image, out, end: 0, fixed, l1, l2, reader, data }
    }

    /// The L2 table with this index, if there is one.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn table(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<Option<u64>> {
        let at = self.image.l1_place(index);
        if let Some(number) = self.l1.changed(at) {
            // Our own may lie behind the end that the file has by now.
            return Ok((number != 0).then_some(number));
        }
        let number = self.l1.get(io, at, self.image.header.l1_range().end)?;
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
        if let Some(number) = self.l2.changed(at) {
            return Ok(Entry::decode(number, self.image.header.cluster_bits));
        }
        let number = self.l2.get(io, at, table.saturating_add(self.image.header.table_bytes()))?;
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
            self.data.push(Request::zero(self.image.device, offset, length));
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
        self.l1.set(io, self.image.l1_place(index), self.image.header.l1_range().end, table)?;
        Ok(table)
    }

    /// Write what arrives for a cluster. Its data is submitted by [`Writer::submit`], its entry written by [`Writer::step`].
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn write_cluster(
        &mut self,
        io: &mut dyn BlockIo,
        disk: Disk,
        arriving: &ClusterParts,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (cluster, range) = (arriving.cluster, disk.range(arriving.cluster));
        let index = cluster >> self.image.header.l2_bits;
        let entry = self.lookup(io, cluster)?;
        let shows = below.exists() && range.start < below.length();
        let arrival = arriving.arrival(disk);
        let (offset, is_allocated) = match decide(entry, arrival, shows) {
            Action::Nothing => return Ok(()),
            Action::InPlace(offset) => (offset, false),
            Action::Allocate | Action::MarkZero(_) => (self.new_cluster(io, index, cluster)?, true),
        };
        // What is around the new data of a compressed cluster is decoded from it.
        let packed = match entry {
            Entry::Compressed { offset, length } if !arrival.whole => Some((offset, length)),
            _ => None,
        };
        let place = ClusterPlace { guest: range, offset, is_new: is_allocated && packed.is_none() };
        if is_allocated && shows && entry == Entry::Free {
            self.data.fill_around(io, &mut self.out, &place, &arriving.parts, below)?;
        }
        if let Some(stream) = packed {
            let size = self.image.header.cluster_size();
            let mut bytes = vec![0; usize::try_from(size).map_err(|_| overflow("the cluster size"))?];
            self.reader.read(io, &self.image, (cluster * size, stream), 0, &mut bytes)?;
            self.data.push_bytes(self.image.device, offset, bytes);
        }
        self.data.write_parts(io, &mut self.out, &place, &arriving.parts)?;
        if self.l1.is_full() || self.l2.is_full() {
            self.step(io)?;
        }
        Ok(())
    }

    /// A cluster at the end of what is used, which reads as zeroes, and the entry for it.
    fn new_cluster(&mut self, io: &mut dyn BlockIo, index: u64, cluster: u64) -> DriverResult<u64> {
        let table = self.make_table(io, index)?;
        let (size, place) = (self.image.header.cluster_size(), self.image.l2_place(table, cluster));
        let offset = self.take(size)?;
        self.clear(offset, size);
        self.l2.set(io, place, table.saturating_add(self.image.header.table_bytes()), offset)?;
        Ok(offset)
    }

    /// Submit the data of the clusters so far: what it is read from need not stay where it is any more.
    ///
    /// # Errors
    /// I/O errors.
    pub fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.data.submit(io, &mut self.out)
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
        if self.l2.is_changed() || self.l1.is_changed() {
            self.lengthen(io)?;
            // Each flushes first what its entries name: the data, and then the L2 tables.
            self.l2.write(io, &mut self.out)?;
            self.l1.write(io, &mut self.out)?;
            self.forget();
        }
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

/// Bytes of an L1 table with this many entries.
pub const fn l1_bytes(entries: u64) -> u64 {
    entries.saturating_mul(ENTRY_BYTES)
}
