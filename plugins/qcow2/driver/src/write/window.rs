//! Writing a window of clusters into the backing, ordered and flushed.
//!
//! Until the overlay is emptied, everything that is committed is still read from the overlay: the backing's
//! content at those guest offsets may be old or new. What must hold at every instant, for every subset of
//! the writes since the last flush, is that the backing stays consistent. The order, and the crash that each
//! step survives:
//!
//! Before the first window: autoclear features are cleared, and an image with the dirty bit is repaired, which keeps the
//! bit until everything is right and durable (see [`repair`](crate::check::repair)). From then on it is as good as any other.
//! A backing that is to grow does so then, see [`grow`](crate::grow).
//!
//! 0. The bits of enabled bitmaps, *durably* ([`record_bits`](crate::write::record_bits)): they may say too much, never too little.
//! 1. Data (into clusters that one L2 entry owns, or into new ones), and copies of L2 tables that a snapshot shares.
//!    Nothing refers to new clusters yet: a crash here leaves leaks at most. There is no flush behind it, because the next
//!    step has one, and none of these writes depends on another.
//! 2. New clusters count, which is [published](crate::refcount::publish): *durable* with all that step 1 wrote.
//! 3. L2 tables: new ones whole, entries of old ones, *then a flush*. What an entry refers to is durable and
//!    has refcount 1; a new table is not referred to yet.
//! 4. L1 entries of new tables, *then a flush*.
//! 5. Refcounts of clusters that nothing refers to any more go down, and their space is given back. Nothing
//!    depends on it: a crash leaves leaks. It is flushed with the next window, or by `finish`.

use crate::image::overflow;
use crate::refcount::space::{Reserved, BATCH};
use crate::write::action::Action;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::remap::Remap;
use crate::write::sink::Qcow2Sink;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, ReadBelow};
use instar_qcow2_format::{GuestCluster, HostCluster, HostOffset, L1Entry};

/// An L2 table that is made.
struct NewTable {
    /// Index of its L1 entry.
    index: u64,
    /// Where it is made.
    offset: HostOffset,
    /// The table that it takes the place of: a snapshot keeps that.
    old: Option<HostOffset>,
}

impl Qcow2Sink {
    /// Flush, if anything was written since the last flush.
    pub(crate) fn flush(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.out.barrier(io)
    }

    /// Before the first change: autoclear features that this program does not keep up must go ("Header",
    /// `autoclear_features`). Flushed alone, so that no change is durable while they still claim to hold. Then what the
    /// dirty bit stands for is put right.
    pub(crate) fn start(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.image.clear_autoclear(io)?;
        self.repair(io)?;
        self.started = true;
        Ok(())
    }

    /// Write the repair, if there is one.
    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let Some(repair) = self.repair.take() else { return Ok(()) };
        repair.apply(io, &mut self.image, &mut self.space, [&mut self.l1, &mut self.l2])
    }

    /// Write one window.
    pub(crate) fn write_window(
        &mut self,
        io: &mut dyn BlockIo,
        pieces: &[ClusterExtent],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        if !self.started {
            self.start(io)?;
        }
        self.record_in_bitmaps(io, pieces)?;
        self.load_mapping(io, pieces)?;
        let groups: Vec<&[ClusterExtent]> = pieces.chunk_by(|a, b| a.cluster == b.cluster).collect();
        let mut actions = Vec::with_capacity(groups.len());
        // Tables to be made, each with the one that it takes the place of, if a snapshot shares that.
        let mut tables: Vec<(u64, Option<HostOffset>)> = Vec::new();
        let mut new_data = 0;
        for group in &groups {
            let cluster = group.first().map_or(GuestCluster(0), |piece| piece.cluster);
            let action = self.action(group, &self.l2_entry(cluster)?);
            new_data += u64::from(action.allocates());
            let (_, index) = self.l1_position(cluster);
            if action.remaps() && tables.last().is_none_or(|&(last, _)| last != index) {
                match self.l2_table(cluster)? {
                    None => tables.push((index, None)),
                    Some((table, false)) => tables.push((index, Some(table))),
                    Some((_, true)) => {}
                }
            }
            actions.push(action);
        }

        let mut reserved = self.reserve(io, tables.len() as u64 + new_data)?;
        self.zero_what_stays(io, &reserved, tables.len(), &groups, &actions)?;
        let mut new_tables = Vec::with_capacity(tables.len());
        for (index, old) in tables {
            new_tables.push(NewTable { index, offset: self.host_offset(reserved.next()?)?, old });
        }

        // Step 1.
        let (remaps, mut freed) = self.write_data(io, &groups, &actions, &mut reserved, below)?;
        self.copy_shared_tables(io, &new_tables)?;
        // Step 2.
        self.publish(io)?;
        // Step 3.
        self.remap(io, &new_tables, &remaps)?;
        // Step 4.
        if !new_tables.is_empty() {
            for table in new_tables {
                let at = self.image.header.l1_table.0 + table.index * 8;
                self.l1.set_entry(at, L1Entry::Table { offset: table.offset, copied: true }.encode())?;
                freed.extend(table.old.map(|old| self.image.host_cluster(old)));
            }
            self.l1.write_dirty(io)?;
            self.out.written();
            self.flush(io)?;
        }
        // Step 5.
        self.free(io, freed)
    }

    /// Reserve clusters, with refcount 1. Nothing durable refers to them.
    pub(crate) fn reserve(&mut self, io: &mut dyn BlockIo, count: u64) -> DriverResult<Reserved> {
        self.space.reserve(io, &mut self.image, &mut self.out, count)
    }

    /// Zero new clusters, those of `stale`, which are ascending runs for the most part.
    pub(crate) fn zero_clusters(&mut self, io: &mut dyn BlockIo, stale: &[HostCluster]) -> DriverResult<()> {
        let bytes = self.image.cluster_size().bytes();
        let mut requests: Vec<Request> = Vec::new();
        for &cluster in stale {
            let at = self.host_offset(cluster)?.0;
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
                "{}; the file is {grown} bytes longer than before, which running the commit again will use",
                error.text
            );
        }
        error
    }

    pub(crate) fn host_offset(&self, cluster: HostCluster) -> DriverResult<HostOffset> {
        self.image.cluster_size().host_offset(cluster).ok_or_else(|| overflow("a host offset"))
    }

    /// New clusters read as zeroes wherever nothing is written into them. `tables` are the first of those that were
    /// reserved; data clusters follow, in the order of their groups, and need nothing if their pieces fill them.
    fn zero_what_stays(
        &mut self,
        io: &mut dyn BlockIo,
        reserved: &Reserved,
        tables: usize,
        groups: &[&[ClusterExtent]],
        actions: &[Action],
    ) -> DriverResult<()> {
        let bytes = self.image.cluster_size().bytes();
        let filled = |group: &[ClusterExtent]| {
            let data = group.iter().filter(|piece| !piece.is_zero());
            data.map(|piece| piece.length).sum::<u64>() == bytes
        };
        let mut data = groups.iter().zip(actions).filter(|(_, action)| action.allocates());
        let mut stale = Vec::new();
        for (index, cluster) in reserved.stale() {
            if index < tables || !data.next().is_some_and(|(group, _)| filled(group)) {
                stale.push(cluster);
            }
        }
        self.zero_clusters(io, &stale)
    }

    /// L2 tables that a snapshot shares are copied whole, before their entries change in step 3.
    fn copy_shared_tables(&mut self, io: &mut dyn BlockIo, tables: &[NewTable]) -> DriverResult<()> {
        let (device, bytes) = (self.image.device, self.image.cluster_size().bytes());
        let copies = tables.iter().filter_map(|table| table.old.map(|old| (old, table.offset)));
        let mut requests: Vec<Request> =
            copies.map(|(old, new)| Request::copy(device, old.0, device, new.0, bytes)).collect();
        self.out.run(io, &mut requests)
    }

    /// Step 2: durable when it returns, but for the release of an old refcount table, which need not be.
    pub(crate) fn publish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let replaced = self.space.publish(io, &mut self.image, &mut self.out)?;
        self.free(io, replaced)
    }

    /// Step 3: the entries of L2 tables, new tables included.
    fn remap(&mut self, io: &mut dyn BlockIo, new_tables: &[NewTable], remaps: &[Remap]) -> DriverResult<()> {
        let (entries, width) = (self.image.header.l2_entries(), self.image.header.l2_entry_bytes());
        for remap in remaps {
            let (_, index) = self.l1_position(remap.cluster);
            let in_table = remap.cluster.0 % entries * width;
            let new = new_tables.binary_search_by_key(&index, |table| table.index).ok();
            let at = match new.and_then(|i| new_tables.get(i)) {
                Some(table) => {
                    let at = table.offset.0 + in_table;
                    match table.old {
                        None => self.l2.insert_zeroed(at),
                        Some(old) => self.l2.insert_copy(old.0 + in_table, at)?,
                    }
                    at
                }
                None => self.l2_position(remap.cluster)?.ok_or_else(|| overflow("an L2 table"))?,
            };
            self.l2.set_entry(at, remap.entry)?;
            if let Some(bitmap) = remap.bitmap {
                self.l2.set_entry(at + 8, bitmap)?;
            }
        }
        if self.l2.is_dirty() {
            self.space.referenced();
            self.l2.write_dirty(io)?;
            self.out.written();
            self.flush(io)?;
        }
        Ok(())
    }

    /// Step 5: one reference less to each of these clusters, which nothing refers to any more.
    pub(crate) fn free(&mut self, io: &mut dyn BlockIo, clusters: Vec<HostCluster>) -> DriverResult<()> {
        self.space.release(io, &self.image, &mut self.out, clusters)
    }
}
