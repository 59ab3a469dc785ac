//! Emptying an overlay in which not all clusters are the active state's own: internal snapshots share some, and
//! persistent bitmaps have theirs.
//!
//! What the active state refers to loses one reference each; what is left without any is given back. The order, and
//! the crash that each step survives:
//!
//! 1. Autoclear features that this program does not keep up are cleared, *then a flush*. An image with the dirty bit
//!    is repaired here, so that all refcounts are right: see [`repair`](crate::check::repair).
//! 2. For one piece of the L1 table after the other: it is zeroed, *then a flush*; then the refcounts of the tables and
//!    clusters that were mapped there go down, and space is given back. The active state does not refer to them any
//!    more, durably; snapshots keep their own references. A crash leaves leaks.
//! 3. Refcount blocks that describe nothing in use any more go from the refcount table, as in [`empty`](crate::empty),
//!    *then a flush*; then their own clusters are released. Whether the refcounts of step 2 are durable by then does not
//!    matter: nothing refers to those clusters.
//! 4. The file is cut after the last cluster that has a refcount, *then a flush* of all that was released. A crash leaves
//!    leaks, some of them perhaps past the end of the file.

use crate::empty::refcount_table::{BlockSet, BlockTable};
use crate::empty::Emptying;
use crate::image::{overflow, Image};
use crate::metadata::entries::decode_l1;
use crate::metadata::l2_entry::decode_entry;
use crate::refcount::blocks::Refcounts;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, Holes};
use instar_qcow2_format::{get_refcount, CompressedRange, HostCluster, HostOffset, L2Entry};

/// Bytes of the L1 table that are unmapped between two flushes.
const L1_PIECE: u64 = 32 << 10;
/// Bytes of an L2 table that are looked at at once.
const L2_PIECE: u64 = 64 << 10;
/// Memory for the set of clusters of refcount blocks, in bytes, whatever their number.
const SET_BUDGET: usize = 4 << 20;

impl Emptying<'_> {
    /// Drop the active mappings; what snapshots and bitmaps hold stays.
    pub(super) fn empty_shared(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let mut refcounts = Refcounts::new(self.image);
        let (base, bytes) = (self.image.header.l1_table.0, self.image.header.l1_bytes());
        let mut at = 0;
        while at < bytes {
            let length = (bytes - at).min(L1_PIECE);
            let tables = self.unmap(io, base + at, at / 8, length)?;
            for table in tables {
                self.release_table(io, &mut refcounts, table)?;
            }
            at += length;
        }
        Ok(())
    }

    /// Zero a piece of the L1 table; returns the L2 tables that it referred to. Durable when it returns.
    fn unmap(&self, io: &mut dyn BlockIo, at: u64, first: u64, length: u64) -> DriverResult<Vec<HostOffset>> {
        let mut piece = vec![0; usize::try_from(length).map_err(|_| overflow("the L1 table"))?];
        io.read(self.image.device, at, &mut piece)?;
        let mut tables = Vec::new();
        for (index, raw) in (0u64..).zip(piece.chunks_exact(8)) {
            let raw = u64::from_be_bytes(raw.try_into().unwrap_or([0; 8]));
            tables.extend(decode_l1(self.image, first + index, at + index * 8, raw)?.map(|(table, _)| table));
        }
        if !tables.is_empty() {
            piece.fill(0);
            io.write(self.image.device, at, &piece)?;
            io.flush(self.image.device)?;
        }
        Ok(tables)
    }

    /// One reference less to an L2 table, and to everything that it maps.
    fn release_table(&self, io: &mut dyn BlockIo, refcounts: &mut Refcounts, table: HostOffset) -> DriverResult<()> {
        let image = &*self.image;
        let size = image.cluster_size();
        let length = size.bytes().min(L2_PIECE);
        let mut piece = vec![0; usize::try_from(length).map_err(|_| overflow("the L2 table"))?];
        for at in (table.0..table.0 + size.bytes()).step_by(piece.len()) {
            io.read(image.device, at, &mut piece)?;
            let mut clusters = Vec::new();
            let width = image.header.l2_entry_bytes();
            for (index, raw) in (0u64..).zip(piece.chunks_exact(usize::try_from(width).unwrap_or(8))) {
                let (entry, _) = decode_entry(image, raw)
                    .map_err(|error| image.corrupt(at + index * width, format!("an L2 entry {error}")))?;
                if let L2Entry::Compressed { descriptor } = entry {
                    clusters.extend(CompressedRange::decode(descriptor, size).host_clusters(size));
                }
                clusters.extend(image.own_host(entry).map(|(offset, _)| size.host_cluster(offset)));
            }
            refcounts.release(io, image, clusters)?;
        }
        refcounts.release(io, image, vec![size.host_cluster(table)])
    }

    /// Steps 3 and 4.
    pub(super) fn trim_shared(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let image = &self.image.clone();
        let mut table = BlockTable::new(image);
        let mut needed = table.none();
        self.add_used(io, &mut table, &mut needed)?;
        self.add_fixed(&table, &mut needed);
        table.complete(io, &mut needed)?;
        table.drop_blocks(io, &needed, true)?;
        let (mut last, mut holes) = (HostCluster(0), Holes::default());
        table.each_block(io, true, &mut |io, index, offset| {
            each_in_use(io, image, index, offset, &mut holes, &mut |cluster| last = last.max(cluster))?;
            Ok(last.0 == 0)
        })?;
        let end = image.cluster_size().host_offset(HostCluster(last.0 + 1)).ok_or_else(|| overflow("a cluster"))?;
        let device = image.device;
        if end.0 < self.image.file_length {
            self.image.file_length = end.0;
            io.run(&mut [Request::set_length(device, end.0)])?;
        }
        io.flush(device)
    }

    /// Add the blocks that describe anything in use that is no refcount block.
    fn add_used(&self, io: &mut dyn BlockIo, table: &mut BlockTable<'_>, used: &mut BlockSet) -> DriverResult<()> {
        let image = &*self.image;
        let (mut floor, mut holes) = (HostCluster(0), Holes::default());
        loop {
            let own = table.own_clusters(io, floor, SET_BUDGET)?;
            let next = own.next_floor();
            let range = floor.0..next.map_or(u64::MAX, |cluster| cluster.0);
            let first = table.describing(floor);
            let last = table.describing(HostCluster(range.end - 1));
            table.each_block(io, false, &mut |io, index, block| {
                if index >= first && index <= last && !used.contains(index) {
                    let mut any = false;
                    each_in_use(io, image, index, block, &mut holes, &mut |cluster| {
                        any |= range.contains(&cluster.0) && !own.contains(cluster);
                    })?;
                    if any {
                        used.insert(index);
                    }
                }
                Ok(index <= last)
            })?;
            match next {
                Some(next) => floor = next,
                None => return Ok(()),
            }
        }
    }
}

/// Call `each` with every cluster that the refcount block `index`, at `offset`, says is in use.
fn each_in_use(
    io: &mut dyn BlockIo,
    image: &Image,
    index: u64,
    offset: HostOffset,
    holes: &mut Holes,
    each: &mut dyn FnMut(HostCluster),
) -> DriverResult<()> {
    let order = image.header.refcount_order;
    let bytes = image.cluster_size().bytes();
    // Blocks that describe nothing may lie in a hole, a million of them.
    let range = offset.0..offset.0 + bytes;
    if holes.hold_data(io, image.device, core::slice::from_ref(&range))? == [false] {
        return Ok(());
    }
    let mut block = vec![0; usize::try_from(bytes).map_err(|_| overflow("a refcount block"))?];
    io.read(image.device, offset.0, &mut block)?;
    let first = index * order.entries_in(bytes);
    // Refcounts that eight bytes hold: one at least, 64 at most.
    let per_word = order.entries_in(8);
    for (number, word) in (0u64..).zip(block.chunks_exact(8)).filter(|(_, word)| *word != [0; 8]) {
        for (position, cluster) in (0usize..).zip(first + number * per_word..first + (number + 1) * per_word) {
            if get_refcount(word, order, position).is_some_and(|count| count != 0) {
                each(HostCluster(cluster));
            }
        }
    }
    Ok(())
}
