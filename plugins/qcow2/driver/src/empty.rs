//! Emptying an overlay, ordered and flushed.
//!
//! When this begins, everything that the overlay holds is durable in the backing, so the overlay reads the
//! same with or without any of its mappings. The order, and the crash that each step survives:
//!
//! 1. Autoclear features that this program does not keep up are cleared, *then a flush*: nothing else has
//!    changed. An image with the dirty bit is repaired here, and does not have it any more: see
//!    [`repair`](crate::repair).
//! 2. The L1 table is zeroed, *then a flush*. Any part of it may be durable before the rest: what is unmapped
//!    reads from the backing, what is mapped still has its clusters.
//! 3. Refcount blocks that only describe clusters that are free now go from the refcount table, *then a
//!    flush*; in rounds, so that a block that describes another one goes after that. Nothing refers to those
//!    clusters any more: a crash leaves leaks.
//! 4. The blocks that stay are cut down to header, tables and blocks themselves; the file is cut after the last cluster
//!    that is in use, and holes are punched before it; *then a flush*. Nothing refers to the clusters concerned: whatever
//!    is durable first, a crash leaves leaks, some of them perhaps past the end of the file.

use crate::image::overflow;
use crate::refcounts::Refcounts;
use crate::scan::{scan_refcount_table, scan_table};
use crate::source::Qcow2Source;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{
    autoclear, set_refcount, ExtensionKind, HostCluster, HostOffset, RefcountOrder, Version, AUTOCLEAR_OFFSET,
};

/// Bytes of zeroes that are written at once.
const ZERO_CHUNK: u64 = 256 << 10;
/// Blocks that describe each other in a longer chain than this stay in the table.
const MAX_ROUNDS: usize = 8;

impl Qcow2Source {
    /// Drop all mappings and give the space back; returns the number of clusters that were dropped.
    pub(crate) fn empty_image(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.image.refuse_unwritable()?;
        let cleared = match self.held {
            Some(clusters) => clusters,
            None => self.check_image(io, true)?,
        };
        self.forget_tables();
        self.held = None;
        self.clear_autoclear(io)?;
        if let Some(mut repair) = self.repair.take() {
            repair.apply(io)?;
            self.image = repair.image;
        }
        if self.is_shared() {
            self.empty_shared(io)?;
            self.trim_shared(io)?;
            return Ok(cleared);
        }
        if cleared > 0 || self.holds_tables(io)? {
            self.zero_l1(io)?;
        }
        let kept = self.drop_blocks(io, Vec::new())?;
        let retained = self.retained(&kept);
        let rewritten = self.rewrite_blocks(io, &kept, &retained)?;
        self.give_back(io, &retained, rewritten)?;
        Ok(cleared)
    }

    /// Step 1.
    fn clear_autoclear(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let header = &self.image.header;
        let kept = header.autoclear & autoclear::BITMAPS;
        if header.version == Version::V3 && header.autoclear != kept {
            io.write(self.image.device, AUTOCLEAR_OFFSET, &kept.to_be_bytes())?;
            io.flush(self.image.device)?;
        }
        Ok(())
    }

    /// Whether the L1 table has any entry: of a table with or without clusters in it, or past the end of the disk.
    fn holds_tables(&self, io: &mut dyn BlockIo) -> DriverResult<bool> {
        let mut any = false;
        let header = &self.image.header;
        scan_table(io, &self.image, header.l1_table, u64::from(header.l1_entries), &mut |_, _, _| {
            any = true;
            Ok(())
        })?;
        Ok(any)
    }

    /// Step 2.
    fn zero_l1(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let (base, bytes) = (self.image.header.l1_table.0, self.image.header.l1_bytes());
        let zeroes = vec![0; usize::try_from(bytes.min(ZERO_CHUNK)).map_err(|_| overflow("the L1 table"))?];
        let mut requests = Vec::new();
        let mut at = 0;
        while at < bytes {
            let length = (bytes - at).min(ZERO_CHUNK);
            requests.push(Request::write(self.image.device, base + at, zeroes.as_ptr() as u64, length));
            at += length;
        }
        requests.push(Request::flush(self.image.device));
        io.run(&mut requests)
    }

    /// Clusters that stay in use whatever happens: header, refcount table, L1 table.
    fn fixed_ranges(&self) -> [(u64, u64); 3] {
        let size = self.image.cluster_size();
        let header = &self.image.header;
        let span = |offset: HostOffset, bytes: u64| {
            let first = size.host_cluster(offset).0;
            (first, first + size.count_for(bytes))
        };
        [
            (0, 1),
            span(header.refcount_table, header.refcount_table_bytes()),
            if header.l1_entries == 0 { (0, 1) } else { span(header.l1_table, header.l1_bytes()) },
        ]
    }

    /// Whether clusters of the file may belong to others than the active state: to snapshots, to bitmaps, or to a header
    /// extension that this program does not know.
    pub(crate) fn is_shared(&self) -> bool {
        let known = |kind| matches!(kind, ExtensionKind::BackingFormat | ExtensionKind::FeatureNames);
        self.image.header.snapshots != 0 || self.image.header.extensions.iter().any(|e| !known(e.kind))
    }

    /// Step 3. The blocks `in_use` (by their index) stay, and those that describe what stays. Returns what stays.
    pub(crate) fn drop_blocks(
        &self,
        io: &mut dyn BlockIo,
        in_use: Vec<u64>,
    ) -> DriverResult<BTreeMap<u64, HostOffset>> {
        let mut blocks = BTreeMap::new();
        scan_refcount_table(io, &self.image, &mut |index, _, offset| {
            blocks.insert(index, offset);
            Ok(())
        })?;
        let refcounts = Refcounts::new(&self.image);
        let described_by = |offset: HostOffset| refcounts.locate(self.image.host_cluster(offset)).0;
        // What stays needs its block; that block needs the block that describes it; and so on.
        let mut needed: BTreeSet<u64> = BTreeSet::new();
        let per_block = refcounts.per_block();
        let mut open = in_use;
        let fixed = self.fixed_ranges();
        open.extend(fixed.iter().flat_map(|&(first, end)| first / per_block..=(end - 1) / per_block));
        while let Some(index) = open.pop() {
            if needed.insert(index) {
                open.extend(blocks.get(&index).map(|&offset| described_by(offset)));
            }
        }
        let mut unneeded: BTreeMap<u64, HostOffset> = blocks
            .iter()
            .filter(|(index, _)| !needed.contains(index))
            .map(|(&index, &offset)| (index, offset))
            .collect();
        for _ in 0..MAX_ROUNDS {
            let describes_others: BTreeSet<u64> = unneeded
                .iter()
                .map(|(&index, &offset)| (index, described_by(offset)))
                .filter(|(index, by)| index != by)
                .map(|(_, by)| by)
                .collect();
            let now: Vec<u64> = unneeded.keys().filter(|index| !describes_others.contains(index)).copied().collect();
            if now.is_empty() {
                break;
            }
            self.drop_table_entries(io, &now)?;
            for index in now {
                unneeded.remove(&index);
                blocks.remove(&index);
            }
        }
        Ok(blocks)
    }

    fn drop_table_entries(&self, io: &mut dyn BlockIo, indices: &[u64]) -> DriverResult<()> {
        let mut refcounts = Refcounts::new(&self.image);
        let offsets: Vec<u64> = indices.iter().map(|&index| refcounts.table_entry_at(index)).collect();
        refcounts.table.load(io, offsets.iter().copied())?;
        for at in offsets {
            refcounts.table.set_entry(at, 0)?;
        }
        refcounts.table.write_dirty(io)?;
        io.flush(self.image.device)
    }

    /// Ranges of clusters that stay in use, sorted: first, and one past the last.
    fn retained(&self, kept: &BTreeMap<u64, HostOffset>) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = self.fixed_ranges().into();
        ranges.extend(kept.values().map(|&offset| self.image.host_cluster(offset).0).map(|c| (c, c + 1)));
        ranges.sort_unstable();
        ranges
    }

    /// Step 4, the blocks. Returns whether any has changed.
    fn rewrite_blocks(
        &self,
        io: &mut dyn BlockIo,
        kept: &BTreeMap<u64, HostOffset>,
        retained: &[(u64, u64)],
    ) -> DriverResult<bool> {
        let mut refcounts = Refcounts::new(&self.image);
        let order = refcounts.order();
        let per_block = refcounts.per_block();
        let slice = self.image.slice_size() as u64;
        let mut changed = false;
        for (&index, &offset) in kept {
            refcounts.blocks.clear();
            let slices = (0..self.image.cluster_size().bytes() / slice).map(|i| offset.0 + i * slice);
            refcounts.blocks.load(io, slices.clone())?;
            let first = index * per_block;
            let per_slice = order.entries_in(slice);
            for (i, at) in slices.enumerate() {
                let from = first + i as u64 * per_slice;
                refcounts.blocks.replace(at, &counts_of(order, from, per_slice, slice, retained)?)?;
            }
            changed |= refcounts.blocks.is_dirty();
            refcounts.blocks.write_dirty(io)?;
        }
        Ok(changed)
    }

    /// Step 4, the file; `unflushed` if its flush has more to make durable.
    fn give_back(&mut self, io: &mut dyn BlockIo, retained: &[(u64, u64)], unflushed: bool) -> DriverResult<()> {
        let size = self.image.cluster_size();
        let device = self.image.device;
        let offset = |cluster: u64| size.host_offset(HostCluster(cluster)).ok_or_else(|| overflow("a cluster"));
        let mut requests = Vec::new();
        let mut end = 0;
        for &(first, after) in retained {
            if first > end {
                requests.push(Request::discard(device, offset(end)?.0, offset(first - end)?.0));
            }
            end = end.max(after);
        }
        let length = offset(end)?.0;
        if length < self.image.file_length {
            requests.push(Request::set_length(device, length));
            self.image.file_length = length;
        }
        if requests.is_empty() && !unflushed {
            return Ok(());
        }
        requests.push(Request::flush(device));
        io.run(&mut requests)
    }
}

/// A slice of a refcount block that describes `count` clusters from `from` on: 1 for what is retained.
fn counts_of(
    order: RefcountOrder,
    from: u64,
    count: u64,
    bytes: u64,
    retained: &[(u64, u64)],
) -> DriverResult<Vec<u8>> {
    let mut slice = vec![0; usize::try_from(bytes).map_err(|_| overflow("the size of a slice"))?];
    for &(first, after) in retained {
        for cluster in first.max(from)..after.min(from + count) {
            let index = usize::try_from(cluster - from).map_err(|_| overflow("the index of a refcount"))?;
            set_refcount(&mut slice, order, index, 1).ok_or_else(|| overflow("the index of a refcount"))?;
        }
    }
    Ok(slice)
}
