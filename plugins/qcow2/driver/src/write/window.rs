//! Writing a window of clusters into the backing, ordered and flushed.
//!
//! Until the overlay is emptied, everything that is committed is still read from the overlay: the backing's
//! content at those guest offsets may be old or new. What must hold at every instant, for every subset of
//! the writes since the last flush, is that the backing stays consistent. The order, and the crash that each
//! step survives:
//!
//! Before the first window: autoclear features are cleared, and an image with the dirty bit is repaired, which keeps the
//! bit until everything is right and durable (see [`repair`](crate::check::repair)). From then on it is as good as any
//! other. A backing that is to grow does so then, see [`grow`](crate::grow).
//!
//! 0. The bits of enabled bitmaps, *durably* ([`record_bits`](crate::write::record_bits)): they may say too much, never
//!    too little.
//! 1. Data (into clusters that one L2 entry owns, or into new ones), and copies of L2 tables that a snapshot shares.
//!    Nothing refers to new clusters yet: a crash here leaves leaks at most. There is no flush behind it, because the next
//!    step has one, and none of these writes depends on another.
//!    A [data file](crate::data_file) has a place for each cluster, and is flushed at the end of this step: what is written
//!    into one that no entry refers to shows nowhere.
//! 2. New clusters count, which is [published](crate::refcount::publish): *durable* with all that step 1 wrote.
//! 3. L2 tables: new ones whole, entries of old ones, *then a flush*. What an entry refers to is durable and
//!    has refcount 1; a new table is not referred to yet.
//! 4. L1 entries of new tables, *then a flush*.
//! 5. Refcounts of clusters that nothing refers to any more go down, and their space is given back. Nothing
//!    depends on it: a crash leaves leaks. (In a data file, they are punched out.) It is flushed with the next window, or by `finish`.

use crate::image::{overflow, Image};
use crate::metadata::mapping::{l1_position, Mapping};
use crate::refcount::space::Reserved;
use crate::write::action::{action, Action};
use crate::write::backing::Backing;
use crate::write::cluster_data::{DataWriter, Written};
use crate::write::cluster_extent::ClusterExtent;
use crate::write::remap::Remap;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, ReadBelow};
use instar_qcow2_format::{GuestCluster, HostOffset, L1Entry};

/// An L2 table that is made.
pub(crate) struct NewTable {
    /// Index of its L1 entry.
    index: u64,
    /// Where it is made.
    offset: HostOffset,
    /// The table that it takes the place of: a snapshot keeps that.
    old: Option<HostOffset>,
}

/// The L2 tables that have to be made, because the entries of some clusters change.
#[derive(Default)]
pub(crate) struct MissingTables {
    /// Indices of their L1 entries, ascending, each with the table that it takes the place of, if a snapshot shares that.
    tables: Vec<(u64, Option<HostOffset>)>,
}

impl MissingTables {
    /// The entry of this cluster changes; they come in ascending order.
    ///
    /// # Errors
    /// Corruption of the L1 entry.
    pub(crate) fn entry_changes(
        &mut self,
        image: &Image,
        mapping: &Mapping,
        cluster: GuestCluster,
    ) -> DriverResult<()> {
        let (_, index) = l1_position(image, cluster);
        if self.tables.last().is_none_or(|&(last, _)| last != index) {
            match mapping.l2_table(image, cluster)? {
                None => self.tables.push((index, None)),
                Some((table, false)) => self.tables.push((index, Some(table))),
                Some((_, true)) => {}
            }
        }
        Ok(())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.tables.len()
    }

    /// Give each a cluster.
    ///
    /// # Errors
    /// A bug of the driver, if there are too few.
    pub(crate) fn place(self, image: &Image, reserved: &mut Reserved) -> DriverResult<Vec<NewTable>> {
        let place = |(index, old)| Ok(NewTable { index, offset: image.host_offset(reserved.next()?)?, old });
        self.tables.into_iter().map(place).collect()
    }
}

/// Write one window: steps 1 to 5.
///
/// # Errors
/// I/O errors, also of what is read below; what planning would have refused.
pub(crate) fn write_window(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    extents: &[ClusterExtent],
    below: &mut dyn ReadBelow,
) -> DriverResult<()> {
    backing.load_mapping(io, extents)?;
    let groups: Vec<&[ClusterExtent]> = extents.chunk_by(|a, b| a.cluster == b.cluster).collect();
    let mut actions = Vec::with_capacity(groups.len());
    let mut missing = MissingTables::default();
    let mut new_data = 0;
    let (image, mapping) = (&backing.image, &backing.mapping);
    for group in &groups {
        let cluster = group.first().map_or(GuestCluster(0), |part| part.cluster);
        let action = action(image, backing.has_backing, group, &mapping.l2_entry(image, cluster)?);
        new_data += u64::from(action.allocates());
        if action.remaps() {
            missing.entry_changes(image, mapping, cluster)?;
        }
        actions.push(action);
    }

    let tables = missing.count();
    let mut reserved = backing.reserve(io, tables as u64 + new_data)?;
    zero_what_stays(io, backing, &reserved, tables, &groups, &actions)?;
    let new_tables = missing.place(&backing.image, &mut reserved)?;

    // Step 1.
    let written = DataWriter::new(backing).write(io, &groups, &actions, &mut reserved, below)?;
    refer(io, backing, new_tables, written)
}

/// The data of a window is written: the rest of step 1, and steps 2 to 5.
///
/// # Errors
/// I/O errors.
pub(crate) fn refer(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    new_tables: Vec<NewTable>,
    written: Written,
) -> DriverResult<()> {
    let Written { remaps, mut freed, unmapped } = written;
    // What a data file holds is durable before anything refers to it.
    backing.data_out.barrier(io)?;
    copy_shared_tables(io, backing, &new_tables)?;
    // Step 2.
    backing.publish(io)?;
    // Step 3.
    remap(io, backing, &new_tables, &remaps)?;
    // Step 4.
    if !new_tables.is_empty() {
        let l1 = &mut backing.mapping.l1;
        for table in new_tables {
            let at = backing.image.header.l1_table.0 + table.index * 8;
            l1.set_entry(at, L1Entry::Table { offset: table.offset, copied: true }.encode())?;
            freed.extend(table.old.map(|old| backing.image.host_cluster(old)));
        }
        l1.write_dirty(io)?;
        backing.out.written();
        backing.flush(io)?;
    }
    // Step 5.
    backing.punch(io, &unmapped)?;
    backing.release(io, freed)
}

/// New clusters read as zeroes wherever nothing is written into them. `tables` are the first of those that were
/// reserved; data clusters follow, in the order of their groups, and need nothing if their parts fill them.
fn zero_what_stays(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    reserved: &Reserved,
    tables: usize,
    groups: &[&[ClusterExtent]],
    actions: &[Action],
) -> DriverResult<()> {
    let bytes = backing.image.cluster_size().bytes();
    let filled = |group: &[ClusterExtent]| {
        let data = group.iter().filter(|part| !part.is_zero());
        data.map(|part| part.length).sum::<u64>() == bytes
    };
    let mut data = groups.iter().zip(actions).filter(|(_, action)| action.allocates());
    let mut stale = Vec::new();
    for (index, cluster) in reserved.stale() {
        if index < tables || !data.next().is_some_and(|(group, _)| filled(group)) {
            stale.push(cluster);
        }
    }
    backing.zero_clusters(io, &stale)
}

/// L2 tables that a snapshot shares are copied whole, before their entries change in step 3.
fn copy_shared_tables(io: &mut dyn BlockIo, backing: &mut Backing, tables: &[NewTable]) -> DriverResult<()> {
    let (device, bytes) = (backing.image.device, backing.image.cluster_size().bytes());
    let copies = tables.iter().filter_map(|table| table.old.map(|old| (old, table.offset)));
    let mut requests: Vec<Request> =
        copies.map(|(old, new)| Request::copy(device, old.0, device, new.0, bytes)).collect();
    backing.out.run(io, &mut requests)
}

/// Step 3: the entries of L2 tables, new tables included.
fn remap(io: &mut dyn BlockIo, backing: &mut Backing, new_tables: &[NewTable], remaps: &[Remap]) -> DriverResult<()> {
    let (entries, width) = (backing.image.header.l2_entries(), backing.image.header.l2_entry_bytes());
    let mapping = &mut backing.mapping;
    for remap in remaps {
        let (_, index) = l1_position(&backing.image, remap.cluster);
        let in_table = remap.cluster.0 % entries * width;
        let new = new_tables.binary_search_by_key(&index, |table| table.index).ok();
        let at = match new.and_then(|i| new_tables.get(i)) {
            Some(table) => {
                let at = table.offset.0 + in_table;
                match table.old {
                    None => mapping.l2.insert_zeroed(at),
                    Some(old) => mapping.l2.insert_copy(old.0 + in_table, at)?,
                }
                at
            }
            None => mapping.l2_position(&backing.image, remap.cluster)?.ok_or_else(|| overflow("an L2 table"))?,
        };
        mapping.l2.set_entry(at, remap.entry)?;
        if let Some(bitmap) = remap.bitmap {
            mapping.l2.set_entry(at + 8, bitmap)?;
        }
    }
    if backing.mapping.l2.is_dirty() {
        backing.space.referenced();
        backing.mapping.l2.write_dirty(io)?;
        backing.out.written();
        backing.flush(io)?;
    }
    Ok(())
}
