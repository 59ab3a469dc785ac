//! Writing a window of clusters into the backing, ordered and flushed.
//!
//! Until the overlay is emptied, everything that is committed is still read from the overlay: the backing's
//! content at those guest offsets may be old or new. What must hold at every instant, for every subset of
//! the writes since the last flush, is that the backing stays consistent. The order, and the crash that each
//! step survives:
//!
//! Before the first window: autoclear features are cleared, and an image with the dirty bit is repaired, which keeps the
//! bit until everything is right and durable (see [`repair`](crate::repair)). From then on it is as good as any other.
//! A backing that is to grow does so then, see [`grow`](crate::grow).
//!
//! 0. The bits of enabled bitmaps, *durably* ([`record`](crate::record)): they may say too much, never too little.
//! 1. Data (into clusters that one L2 entry owns, or into new ones), copies of L2 tables that a snapshot
//!    shares, and refcount blocks (new clusters get refcount 1; new blocks are filled), also a whole new
//!    refcount table, *then a flush*. Nothing refers to new clusters, blocks or tables yet: a crash here leaves
//!    leaks at most. They need no flush between them, because the steps after depend on all of them, and none
//!    of them on another.
//! 2. The refcount table's entries for new blocks, or the header's switch to a new refcount table (12 bytes
//!    within one sector), *then a flush*. A crash before it is durable leaves leaks; after it, new clusters
//!    with refcount 1.
//! 3. L2 tables: new ones whole, entries of old ones, *then a flush*. What an entry refers to is durable and
//!    has refcount 1; a new table is not referred to yet.
//! 4. L1 entries of new tables, *then a flush*.
//! 5. Refcounts of clusters that nothing refers to any more go down, and their space is given back. Nothing
//!    depends on it: a crash leaves leaks. It is flushed with the next window, or by `finish`.

use crate::allocator::Run;
use crate::image::overflow;
use crate::sink::{Action, Fill, Piece, Qcow2Sink};
use crate::subclusters::Place;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ExtentKind, Request, RequestOp};
use instar_guest_sdk::{BlockIo, DriverResult, ReadBelow};
use instar_qcow2_format::{
    autoclear, GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry, Subclusters, Version, AUTOCLEAR_OFFSET,
    REFCOUNT_TABLE_FIELD,
};

/// Requests that are submitted at once.
const BATCH: usize = 4096;

/// Clusters in the order in which they were reserved.
struct Reserved(alloc::vec::IntoIter<Run>, Option<Run>);

impl Reserved {
    fn new(runs: Vec<Run>) -> Self {
        Self(runs.into_iter(), None)
    }

    fn next(&mut self) -> DriverResult<HostCluster> {
        let mut run = match self.1.take() {
            Some(run) => run,
            None => self.0.next().ok_or_else(|| overflow("the number of clusters to allocate"))?,
        };
        let cluster = run.start;
        run.start.0 += 1;
        run.count -= 1;
        self.1 = (run.count > 0).then_some(run);
        Ok(cluster)
    }
}

/// Data requests, merged where they go on from each other.
pub(crate) struct DataWriter {
    requests: Vec<Request>,
}

impl DataWriter {
    pub(crate) fn push(&mut self, io: &mut dyn BlockIo, request: Request) -> DriverResult<()> {
        if let Some(last) = self.requests.last_mut() {
            let same = last.op == request.op
                && last.flags == request.flags
                && last.device == request.device
                && last.src_device == request.src_device;
            let follows = last.offset + last.length == request.offset;
            let goes_on = match RequestOp::from_u32(request.op) {
                Some(RequestOp::Copy) => last.src_offset + last.length == request.src_offset,
                Some(RequestOp::Zero) => true,
                _ => false,
            };
            if same && follows && goes_on {
                last.length += request.length;
                return Ok(());
            }
        }
        if self.requests.len() >= BATCH {
            self.submit(io)?;
        }
        self.requests.push(request);
        Ok(())
    }

    fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if !self.requests.is_empty() {
            io.run(&mut self.requests)?;
            self.requests.clear();
        }
        Ok(())
    }
}

/// An L2 table that is made.
struct NewTable {
    /// Index of its L1 entry.
    index: u64,
    /// Where it is made.
    offset: HostOffset,
    /// The table that it takes the place of: a snapshot keeps that.
    old: Option<HostOffset>,
}

/// The change of an L2 entry.
struct Remap {
    cluster: GuestCluster,
    entry: u64,
    /// The second half of an extended entry. Both halves stand in one sector, which reaches the disk whole.
    bitmap: Option<u64>,
}

impl Remap {
    fn standard(cluster: GuestCluster, entry: L2Entry) -> Self {
        Self { cluster, entry: entry.encode(), bitmap: None }
    }

    fn extended(cluster: GuestCluster, host: Option<(HostOffset, bool)>, subclusters: Subclusters) -> Self {
        let (entry, bitmap) = subclusters.encode(host);
        Self { cluster, entry, bitmap: Some(bitmap) }
    }
}

impl Qcow2Sink {
    /// Flush, if anything was written since the last flush.
    pub(crate) fn flush(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.unflushed {
            io.flush(self.image.device)?;
            self.unflushed = false;
        }
        Ok(())
    }

    /// Before the first change: autoclear features that this program does not keep up must go ("Header",
    /// `autoclear_features`). Flushed alone, so that no change is durable while they still claim to hold. Then what the
    /// dirty bit stands for is put right.
    pub(crate) fn start(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let header = &self.image.header;
        let kept = header.autoclear & autoclear::BITMAPS;
        if header.version == Version::V3 && header.autoclear != kept {
            io.write(self.image.device, AUTOCLEAR_OFFSET, &kept.to_be_bytes())?;
            io.flush(self.image.device)?;
        }
        self.repair(io)?;
        self.started = true;
        Ok(())
    }

    /// Write one window.
    pub(crate) fn write_window(
        &mut self,
        io: &mut dyn BlockIo,
        pieces: &[Piece],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        if !self.started {
            self.start(io)?;
        }
        self.record_in_bitmaps(io, pieces)?;
        self.load_mapping(io, pieces)?;
        let groups: Vec<&[Piece]> = pieces.chunk_by(|a, b| a.cluster == b.cluster).collect();
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

        let mut reserved = Reserved::new(self.reserve(io, tables.len() as u64 + new_data)?);
        let mut new_tables = Vec::with_capacity(tables.len());
        for (index, old) in tables {
            new_tables.push(NewTable { index, offset: self.host_offset(reserved.next()?)?, old });
        }

        // Step 1.
        let (remaps, mut freed) = self.write_data(io, &groups, &actions, &mut reserved, below)?;
        self.copy_shared_tables(io, &new_tables)?;
        self.write_refcounts_and_flush(io)?;
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
            self.unflushed = true;
            self.flush(io)?;
        }
        // Step 5.
        self.free(io, freed)
    }

    /// Reserve clusters, with refcount 1; they read as zeroes. Nothing durable refers to those that are used again.
    pub(crate) fn reserve(&mut self, io: &mut dyn BlockIo, count: u64) -> DriverResult<Vec<Run>> {
        let mut runs = Vec::new();
        let mut missing = count;
        while let Some(run) = self.free_clusters.take(missing) {
            missing -= run.count;
            runs.push(run);
        }
        let size = self.image.cluster_size();
        let mut zero = Vec::with_capacity(runs.len());
        for run in &runs {
            let at = self.host_offset(run.start)?;
            zero.push(Request::zero(self.image.device, at.0, run.count << size.bits()));
            let mut clusters = (run.start.0..run.start.0 + run.count).map(HostCluster);
            self.refcounts.load(io, &self.image, clusters.clone())?;
            clusters.try_for_each(|cluster| self.refcounts.set(&self.image, cluster, 1))?;
        }
        let before = self.image.file_length;
        runs.extend(self.allocator.reserve(io, &mut self.image, &mut self.refcounts, missing)?);
        if self.image.file_length != before {
            zero.push(Request::set_length(self.image.device, self.image.file_length));
        }
        self.unflushed |= !zero.is_empty();
        zero.chunks_mut(BATCH).try_for_each(|requests| io.run(requests))?;
        Ok(runs)
    }

    fn host_offset(&self, cluster: HostCluster) -> DriverResult<HostOffset> {
        self.image.cluster_size().host_offset(cluster).ok_or_else(|| overflow("a host offset"))
    }

    /// Submit the data of a window. Returns the entries to change and the clusters to free.
    fn write_data(
        &mut self,
        io: &mut dyn BlockIo,
        groups: &[&[Piece]],
        actions: &[Action],
        reserved: &mut Reserved,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<(Vec<Remap>, Vec<HostCluster>)> {
        let mut writer = DataWriter { requests: Vec::new() };
        let mut remaps = Vec::new();
        let mut freed = Vec::new();
        for (group, action) in groups.iter().zip(actions) {
            let Some(cluster) = group.first().map(|piece| piece.cluster) else { continue };
            match *action {
                Action::Nothing => {}
                Action::InPlace(host) => self.write_pieces(io, &mut writer, group, host, false)?,
                Action::Revive(host) => {
                    // The bytes that are there are stale: they were behind the zero flag.
                    self.zero_gaps(io, &mut writer, group, host)?;
                    self.write_pieces(io, &mut writer, group, host, false)?;
                    remaps.push(Remap::standard(cluster, L2Entry::Data { offset: host, copied: true }));
                }
                Action::Allocate(fill, old) => {
                    let host = self.host_offset(reserved.next()?)?;
                    match fill {
                        Fill::Zero => {}
                        Fill::Below => self.fill_gaps(io, group, host, below)?,
                        Fill::Cluster(from) => self.copy_gaps(io, &mut writer, group, from, host)?,
                        Fill::Compressed(descriptor) => {
                            let bytes = self.decode(io, cluster, descriptor)?;
                            self.write_gaps(io, group, host, &bytes)?;
                        }
                    }
                    freed.extend(old.host_clusters(self.image.cluster_size()));
                    self.write_pieces(io, &mut writer, group, host, true)?;
                    remaps.push(Remap::standard(cluster, L2Entry::Data { offset: host, copied: true }));
                }
                Action::MakeZero(zero_flag, old) => {
                    let entry =
                        if zero_flag { L2Entry::Zero { offset: None, copied: false } } else { L2Entry::Unallocated };
                    remaps.push(Remap::standard(cluster, entry));
                    freed.extend(old.host_clusters(self.image.cluster_size()));
                }
                Action::Subclusters(change) => {
                    let host = match change.place {
                        Place::Nowhere => None,
                        Place::Here(host, copied) => Some((host, copied)),
                        Place::New => Some((self.host_offset(reserved.next()?)?, true)),
                    };
                    if let Some((host, _)) = host {
                        self.write_change(io, &mut writer, (group, &change), host, below)?;
                    }
                    freed.extend(change.old.host_clusters(self.image.cluster_size()));
                    if change.remaps() {
                        remaps.push(Remap::extended(cluster, host, change.after));
                    }
                }
            }
        }
        writer.submit(io)?;
        Ok((remaps, freed))
    }

    /// Write the pieces of a cluster to its host cluster. New clusters read as zeroes already.
    pub(crate) fn write_pieces(
        &mut self,
        io: &mut dyn BlockIo,
        writer: &mut DataWriter,
        group: &[Piece],
        host: HostOffset,
        fresh: bool,
    ) -> DriverResult<()> {
        let device = self.image.device;
        for piece in group {
            let at = host.0 + piece.start;
            let request = match piece.kind {
                ExtentKind::Data => Request::copy(piece.device, piece.location, device, at, piece.length),
                ExtentKind::Memory => Request::write(device, at, piece.location, piece.length),
                ExtentKind::Zero if fresh => continue,
                ExtentKind::Zero => Request::zero(device, at, piece.length),
                ExtentKind::Encoded => return Err(overflow("the kind of an extent")),
            };
            self.unflushed = true;
            writer.push(io, request)?;
        }
        Ok(())
    }

    /// Byte ranges of a cluster, up to the end of the virtual disk, that no piece covers.
    pub(crate) fn gaps(&self, group: &[Piece]) -> Vec<(u64, u64)> {
        let Some(first) = group.first() else { return Vec::new() };
        let mut gaps = Vec::new();
        let mut at = 0;
        for piece in group {
            if piece.start > at {
                gaps.push((at, piece.start - at));
            }
            at = piece.start + piece.length;
        }
        let end = self.visible_bytes(first.cluster);
        if at < end {
            gaps.push((at, end - at));
        }
        gaps
    }

    fn zero_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        writer: &mut DataWriter,
        group: &[Piece],
        host: HostOffset,
    ) -> DriverResult<()> {
        for (start, length) in self.gaps(group) {
            self.unflushed = true;
            writer.push(io, Request::zero(self.image.device, host.0 + start, length))?;
        }
        Ok(())
    }

    /// Copy from the old cluster what the pieces leave open.
    fn copy_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        writer: &mut DataWriter,
        group: &[Piece],
        from: HostOffset,
        to: HostOffset,
    ) -> DriverResult<()> {
        let device = self.image.device;
        for (start, length) in self.gaps(group) {
            self.unflushed = true;
            writer.push(io, Request::copy(device, from.0 + start, device, to.0 + start, length))?;
        }
        Ok(())
    }

    /// L2 tables that a snapshot shares are copied whole, before their entries change in step 3.
    fn copy_shared_tables(&mut self, io: &mut dyn BlockIo, tables: &[NewTable]) -> DriverResult<()> {
        let (device, bytes) = (self.image.device, self.image.cluster_size().bytes());
        let copies = tables.iter().filter_map(|table| table.old.map(|old| (old, table.offset)));
        let mut requests: Vec<Request> =
            copies.map(|(old, new)| Request::copy(device, old.0, device, new.0, bytes)).collect();
        if requests.is_empty() {
            return Ok(());
        }
        self.unflushed = true;
        io.run(&mut requests)
    }

    /// Copy up what the image's ancestors have where the pieces leave gaps in a new cluster.
    fn fill_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[Piece],
        host: HostOffset,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let Some(first) = group.first() else { return Ok(()) };
        let base = first.cluster.0 << self.image.cluster_size().bits();
        for (start, length) in self.gaps(group) {
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("a gap"))?];
            below.read(io, base + start, &mut bytes)?;
            self.write_unless_zero(io, host.0 + start, &bytes)?;
        }
        Ok(())
    }

    /// Write what the pieces leave open of a new cluster from `bytes`, which are a whole cluster.
    fn write_gaps(
        &mut self,
        io: &mut dyn BlockIo,
        group: &[Piece],
        host: HostOffset,
        bytes: &[u8],
    ) -> DriverResult<()> {
        self.gaps(group).into_iter().try_for_each(|gap| self.write_part(io, host, gap, bytes))
    }

    /// Write a part of a new cluster (first byte, length) from `bytes`, which are a whole cluster.
    pub(crate) fn write_part(
        &mut self,
        io: &mut dyn BlockIo,
        host: HostOffset,
        (start, length): (u64, u64),
        bytes: &[u8],
    ) -> DriverResult<()> {
        let range = usize::try_from(start).ok().zip(usize::try_from(start + length).ok());
        let part = range.and_then(|(start, end)| bytes.get(start..end)).ok_or_else(|| overflow("a gap"))?;
        self.write_unless_zero(io, host.0 + start, part)
    }

    /// Write bytes of a new cluster, which is zero.
    pub(crate) fn write_unless_zero(&mut self, io: &mut dyn BlockIo, at: u64, bytes: &[u8]) -> DriverResult<()> {
        if bytes.iter().any(|&byte| byte != 0) {
            io.write(self.image.device, at, bytes)?;
            self.unflushed = true;
        }
        Ok(())
    }

    /// End of step 1, and step 2.
    pub(crate) fn write_refcounts_and_flush(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.unflushed |= self.refcounts.blocks.is_dirty();
        self.refcounts.blocks.write_dirty(io)?;
        let retired = core::mem::take(&mut self.allocator.retired_tables);
        if retired.is_empty() {
            self.flush(io)?;
            if self.refcounts.table.is_dirty() {
                self.refcounts.table.write_dirty(io)?;
                self.unflushed = true;
            }
            return self.flush(io);
        }
        // The new table is written whole: it reads as zeroes where it has no slices.
        self.refcounts.table.write_dirty(io)?;
        self.unflushed = true;
        self.flush(io)?;
        let clusters = self.refcounts.table_entries / self.image.cluster_size().l2_entries();
        let clusters = u32::try_from(clusters).map_err(|_| overflow("the length of the refcount table"))?;
        let mut field = [0; 12];
        field[..8].copy_from_slice(&self.refcounts.table_offset.0.to_be_bytes());
        field[8..].copy_from_slice(&clusters.to_be_bytes());
        io.write(self.image.device, REFCOUNT_TABLE_FIELD, &field)?;
        self.unflushed = true;
        self.flush(io)?;
        let old = retired.iter().flat_map(|run| (run.start.0..run.start.0 + run.count).map(HostCluster)).collect();
        self.free(io, old)
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
            self.l2.write_dirty(io)?;
            self.unflushed = true;
            self.flush(io)?;
        }
        Ok(())
    }

    /// Step 5: one reference less to each of these clusters, which nothing refers to any more.
    pub(crate) fn free(&mut self, io: &mut dyn BlockIo, clusters: Vec<HostCluster>) -> DriverResult<()> {
        self.unflushed |= !clusters.is_empty();
        self.refcounts.release(io, &self.image, clusters)
    }
}
