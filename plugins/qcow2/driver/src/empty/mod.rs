//! Emptying an overlay, ordered and flushed.
//!
//! When this begins, everything that the overlay holds is durable in the backing, so the overlay reads the
//! same with or without any of its mappings. The order, and the crash that each step survives:
//!
//! 1. Autoclear features that this program does not keep up are cleared, *then a flush*: nothing else has
//!    changed. An image with the dirty bit is repaired here, and does not have it any more: see
//!    [`repair`](crate::check::repair).
//! 2. The L1 table is zeroed, *then a flush*. Any part of it may be durable before the rest: what is unmapped
//!    reads from the backing, what is mapped still has its clusters.
//!    What a data file holds is punched out then, *with a flush* of it. It keeps its length.
//! 3. Refcount blocks that only describe clusters that are free now go from the refcount table, *then a
//!    flush*; in rounds, so that a block that describes another one goes after that. Nothing refers to those
//!    clusters any more: a crash leaves leaks.
//! 4. The blocks that stay are cut down to header, tables and blocks themselves; the file is cut after the last cluster
//!    that is in use, and holes are punched before it; *then a flush*. Nothing refers to the clusters concerned: whatever
//!    is durable first, a crash leaves leaks, some of them perhaps past the end of the file.

pub(crate) mod refcount_table;
pub(crate) mod shared;

use crate::check::repair::Repair;
use crate::empty::refcount_table::{BlockSet, BlockTable};
use crate::image::{overflow, Image};
use crate::metadata::entries::scan_table;
use crate::metadata::reference::Reference;
use crate::metadata::structures::header_structures;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_qcow2_format::HostCluster;

/// Bytes of zeroes that are written at once.
const ZERO_CHUNK: u64 = 256 << 10;
/// Memory for the set of clusters that stay in use, in bytes, whatever their number.
const SET_BUDGET: usize = 4 << 20;
/// Requests that are submitted at once.
const BATCH: usize = 4096;

/// Drop all mappings of an image that was verified, and give the space back. It holds `clusters` clusters of the guest.
/// Durable when it returns.
///
/// # Errors
/// Corruption of the refcount structures; I/O errors.
pub(crate) fn empty(
    io: &mut dyn BlockIo,
    image: &mut Image,
    clusters: u64,
    repair: Option<Repair>,
) -> DriverResult<()> {
    let mut emptying = Emptying { image };
    // Step 1.
    emptying.image.clear_autoclear(io)?;
    if let Some(mut repair) = repair {
        repair.apply(io)?;
        *emptying.image = repair.image;
    }
    if emptying.image.is_shared() {
        emptying.empty_shared(io)?;
        emptying.punch_data_file(io)?;
        return emptying.trim_shared(io);
    }
    if clusters > 0 || emptying.holds_tables(io)? {
        emptying.zero_l1(io)?;
    }
    emptying.punch_data_file(io)?;
    let image = emptying.image.clone();
    let mut table = BlockTable::new(&image);
    let mut needed = table.none();
    emptying.add_fixed(&table, &mut needed);
    table.complete(io, &mut needed)?;
    table.drop_blocks(io, &needed, false)?;
    emptying.give_back(io, &mut table)
}

/// An image that is being emptied.
struct Emptying<'a> {
    image: &'a mut Image,
}

impl Emptying<'_> {
    /// Whether the L1 table has any entry: of a table with or without clusters in it, or past the end of the disk.
    fn holds_tables(&self, io: &mut dyn BlockIo) -> DriverResult<bool> {
        let mut any = false;
        let header = &self.image.header;
        scan_table(io, self.image, header.l1_table, u64::from(header.l1_entries), &mut |_, _, _| {
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

    /// Give back what the data file holds, which nothing refers to any more, durably; it keeps its length.
    fn punch_data_file(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        match self.image.data {
            Some(data) if data.file_length > 0 => {
                io.run(&mut [Request::discard(data.device, 0, data.file_length), Request::flush(data.device)])
            }
            _ => Ok(()),
        }
    }

    /// Add the blocks that describe what stays in use whatever happens: header, refcount table and L1 table.
    fn add_fixed(&self, table: &BlockTable<'_>, needed: &mut BlockSet) {
        for Reference { run, .. } in header_structures(self.image) {
            let (first, last) = (table.describing(run.start), table.describing(HostCluster(run.end() - 1)));
            (first..=last).for_each(|index| {
                needed.insert(index);
            });
        }
    }

    /// Step 4: only what is fixed and the blocks that are left stay in use.
    fn give_back(&mut self, io: &mut dyn BlockIo, table: &mut BlockTable<'_>) -> DriverResult<()> {
        let size = self.image.cluster_size();
        let device = self.image.device;
        let offset = |cluster: u64| size.host_offset(HostCluster(cluster)).ok_or_else(|| overflow("a cluster"));
        let mut out = OrderedWriter::new(device);
        let mut end = 0;
        let mut floor = HostCluster(0);
        loop {
            let mut stays = table.own_clusters(io, floor, SET_BUDGET)?;
            for Reference { run, .. } in header_structures(self.image) {
                stays.insert_range(run.start, run.count);
            }
            let next = stays.next_floor();
            let ceiling = next.map_or(u64::MAX, |cluster| cluster.0);
            if table.rewrite(io, floor.0..ceiling, &stays)? {
                out.written();
            }
            let mut requests = Vec::new();
            for cluster in stays.iter().filter(|cluster| cluster.0 >= floor.0) {
                if cluster.0 > end {
                    requests.push(Request::discard(device, offset(end)?.0, offset(cluster.0 - end)?.0));
                }
                end = end.max(cluster.0 + 1);
                if requests.len() >= BATCH {
                    out.run(io, &mut requests)?;
                    requests.clear();
                }
            }
            out.run(io, &mut requests)?;
            match next {
                Some(next) => floor = next,
                None => break,
            }
        }
        let length = offset(end)?.0;
        if length < self.image.file_length {
            self.image.file_length = length;
            out.run(io, &mut [Request::set_length(device, length), Request::flush(device)])
        } else {
            out.barrier(io)
        }
    }
}
