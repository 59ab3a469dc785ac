//! Planning: verify what a commit will touch in the backing, and count what it must allocate.
//!
//! Nothing is written here. Cost follows from what the overlay holds, not from the size of the backing: the L1 table and
//! the refcount table are walked whole, because data must not land on any metadata, and the L2 tables where
//! [`cross_check`](crate::write::cross_check) says so.

use crate::image::Image;
use crate::metadata::l2_entry::Mapped;
use crate::metadata::map::MetadataMap;
use crate::metadata::mapping::l1_position;
use crate::refcount::blocks::CLUSTERS_PER_LOAD;
use crate::write::action::{action, Action};
use crate::write::backing::Backing;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::touched::Touched;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{incompatible, CompressedRange, GuestCluster, HostCluster, HostOffset, L2Entry};

/// Clusters that a commit will allocate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Single clusters, for data …
    pub(crate) data: u64,
    /// … and for tables.
    pub(crate) tables: u64,
    /// Clusters of longer L1 and bitmap tables, which follow each other …
    pub(crate) runs: u64,
    /// … and the same with the refcount blocks that they may need.
    pub(crate) run_span: u64,
}

impl Needs {
    /// Single clusters.
    pub(crate) fn single(&self) -> u64 {
        self.data + self.tables
    }
}

/// What planning has found out so far.
pub(crate) struct Plan {
    /// Where the metadata of the backing is.
    pub(crate) metadata: MetadataMap,
    pub(crate) touched: Touched,
    pub(crate) needs: Needs,
    /// Guest bytes that are committed.
    pub(crate) committed: u64,
    /// L2 tables that were not looked at.
    pub(crate) unread_tables: u64,
    /// The cluster at the old end of an image that grows, if it was looked at already.
    pub(crate) grown: Option<GuestCluster>,
    /// Index of the last L2 table that was looked at, and of the last one that will be new.
    last_table: Option<u64>,
    last_new_table: Option<u64>,
    last_cluster: Option<GuestCluster>,
}

/// A cluster of the backing that an entry refers to.
struct Owned {
    cluster: HostCluster,
    copied: bool,
    /// Compressed clusters stand in it: any number of references is fine.
    compressed: bool,
    /// Byte offset of the entry that refers to it.
    at: u64,
}

impl Plan {
    /// Nothing was looked at but the metadata.
    pub(crate) fn new(metadata: MetadataMap) -> Self {
        Self {
            metadata,
            touched: Touched::new(),
            needs: Needs::default(),
            committed: 0,
            unread_tables: 0,
            grown: None,
            last_table: None,
            last_new_table: None,
            last_cluster: None,
        }
    }

    /// Verify and count one window.
    ///
    /// # Errors
    /// Corruption of what the window touches; I/O errors.
    pub(crate) fn window(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        extents: &[ClusterExtent],
    ) -> DriverResult<()> {
        backing.load_mapping(io, extents)?;
        let mut owned: Vec<Owned> = Vec::new();
        for group in extents.chunk_by(|a, b| a.cluster == b.cluster) {
            let Some(first) = group.first() else { continue };
            let (l1_at, table_index) = l1_position(&backing.image, first.cluster);
            let table = backing.mapping.l2_table(&backing.image, first.cluster)?;
            if let (Some((offset, copied)), true) = (table, self.last_table != Some(table_index)) {
                let cluster = backing.image.host_cluster(offset);
                owned.push(Owned { cluster, copied, compressed: false, at: l1_at });
                self.touched.tables.insert(cluster);
                self.last_table = Some(table_index);
            }
            let image = &backing.image;
            let mapped = backing.mapping.l2_entry(&backing.image, first.cluster)?;
            let Mapped { entry, at, .. } = mapped;
            if let Some((offset, copied)) = image.own_host(entry) {
                // The same cluster comes twice where an extent ends within it.
                if self.last_cluster != Some(first.cluster) && self.grown != Some(first.cluster) {
                    self.check_data_cluster(image, offset, mapped.data_end(image), at)?;
                    owned.push(Owned { cluster: backing.image.host_cluster(offset), copied, compressed: false, at });
                }
            }
            self.last_cluster = Some(first.cluster);
            if let L2Entry::Compressed { descriptor } = entry {
                self.check_compressed(image, descriptor, at, &mut owned)?;
            }
            let action = action(&backing.image, backing.has_backing, group, &mapped);
            if let Some(data) = &image.data {
                data.refuse_too_long(end_of(&action, image, group))?;
            }
            self.committed += group.iter().map(|part| part.length).sum::<u64>();
            if let Some(descriptor) = action.decodes() {
                // What is needed of it must decode: afterwards it would be too late to say no.
                let Backing { compressed, image, .. } = &mut *backing;
                compressed.read_whole(io, image, first.cluster, descriptor)?;
            }
            // A compressed cluster takes a part of a cluster, if it shrinks: how much of it, only writing finds out.
            let packed = backing.compresses && action.brings_data();
            self.needs.data += u64::from(packed || action.allocates());
            let shared = table.is_some_and(|(_, copied)| !copied);
            if shared && backing.image.own_host(entry).is_some_and(|(_, copied)| copied) {
                let text = "an L2 table that a snapshot shares claims a cluster for itself alone (COPIED)";
                return Err(backing.image.corrupt(at, text));
            }
            if (packed || action.remaps()) && (table.is_none() || shared) && self.last_new_table != Some(table_index) {
                self.needs.tables += 1;
                self.last_new_table = Some(table_index);
            }
        }
        check_owned(io, backing, &mut owned)
    }

    /// A data cluster that an entry refers to: inside the file, not metadata, not used twice. `needed` bytes of it are
    /// the guest's.
    fn check_data_cluster(&mut self, image: &Image, offset: HostOffset, needed: u64, at: u64) -> DriverResult<()> {
        if !image.holds_cluster(offset) || !image.holds_bytes(offset, needed) {
            return Err(image.corrupt(at, format!("an L2 entry points to offset {offset}, past the end of the file")));
        }
        let cluster = image.host_cluster(offset);
        if self.metadata.contains(cluster) {
            return Err(image.corrupt(at, format!("an L2 entry points to offset {offset}, which is metadata")));
        }
        if !self.touched.data.insert(cluster) || self.touched.compressed.contains(cluster) {
            return Err(image.corrupt(at, format!("two L2 entries point to offset {offset}")));
        }
        Ok(())
    }

    /// A compressed cluster that an entry refers to: inside the file, not in metadata, not in the cluster of another
    /// entry.
    fn check_compressed(
        &mut self,
        image: &Image,
        descriptor: u64,
        at: u64,
        owned: &mut Vec<Owned>,
    ) -> DriverResult<()> {
        let range = CompressedRange::decode(descriptor, image.cluster_size());
        if range.last_sector().0 >= image.file_length {
            let text = format!("a compressed cluster at offset {} lies past the end of the file", range.offset);
            return Err(image.corrupt(at, text));
        }
        for cluster in range.host_clusters(image.cluster_size()) {
            let metadata = self.metadata.contains(cluster);
            if metadata || self.touched.data.contains(cluster) {
                let text = format!("a compressed cluster at offset {} overlaps another structure", range.offset);
                return Err(image.corrupt(at, text));
            }
            self.touched.compressed.insert(cluster);
            owned.push(Owned { cluster, copied: false, compressed: true, at });
        }
        Ok(())
    }
}

/// The byte of the data file up to which a cluster is written, as far as it gets bytes.
fn end_of(action: &Action, image: &Image, group: &[ClusterExtent]) -> u64 {
    let Some(first) = group.first().filter(|_| action.brings_data()) else { return 0 };
    let arrives = group.iter().rfind(|part| !part.is_zero()).map_or(0, |part| part.start + part.length);
    let fills = matches!(action, Action::CopyUp(_)) || image.header.has(incompatible::EXTENDED_L2);
    let end = if fills { image.visible_bytes(first.cluster) } else { arrives };
    if end == 0 {
        return 0;
    }
    (first.cluster.0 << image.cluster_size().bits()).saturating_add(end)
}

/// Clusters that will be changed in place must have refcount 1 and say so; those that a snapshot shares have more.
fn check_owned(io: &mut dyn BlockIo, backing: &mut Backing, owned: &mut [Owned]) -> DriverResult<()> {
    let (image, refcounts) = (&backing.image, &mut backing.space.refcounts);
    owned.sort_unstable_by_key(|o| o.cluster);
    for batch in owned.chunks(CLUSTERS_PER_LOAD) {
        refcounts.table.shrink(CLUSTERS_PER_LOAD);
        refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        refcounts.load(io, image, batch.iter().map(|o| o.cluster))?;
        for o in batch {
            let count = refcounts.get(image, o.cluster)?;
            // With a snapshot, or with a count that a crash left too high: what is shared is not changed in place.
            let shared = count > 1 && !o.copied;
            let compressed = o.compressed && count > 0;
            if !shared && !compressed && (count != 1 || !o.copied) {
                return Err(refcount_disagrees(image, o, count));
            }
        }
    }
    Ok(())
}

fn refcount_disagrees(image: &Image, owned: &Owned, count: u64) -> DriverError {
    let offset = image.cluster_size().host_offset(owned.cluster).unwrap_or_default();
    let flag = if owned.copied { "set" } else { "clear" };
    image
        .corrupt(owned.at, format!("the cluster at offset {offset} has refcount {count} and its COPIED flag is {flag}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_guest_sdk::memory::MemoryDevices;
    use instar_guest_sdk::Content;
    use instar_qcow2_testkit::builder::{Spec, State};

    fn parts(spec: &Spec) -> (MemoryDevices, Backing, Plan) {
        let (mut io, image) = open(spec);
        let metadata = MetadataMap::build(&mut io, &image, Vec::new()).unwrap();
        (io, Backing::new(image, false), Plan::new(metadata))
    }

    fn data(cluster: u64, start: u64, length: u64) -> ClusterExtent {
        let content = Content::Data { device: 0, offset: 0 };
        ClusterExtent { cluster: GuestCluster(cluster), start, length, content }
    }

    #[test]
    fn new_clusters_and_tables_are_counted_once() {
        let (mut io, mut backing, mut plan) = parts(&Spec::new(9, 300 << 9).with([(3, State::Data(1))]));
        // One in place, a new one in the same table in two pieces, and two in a table that is new.
        let window = [data(3, 0, 512), data(4, 0, 100), data(4, 200, 100), data(200, 0, 512), data(201, 0, 512)];
        plan.window(&mut io, &mut backing, &window).unwrap();
        // The next window goes on in the same table.
        plan.window(&mut io, &mut backing, &[data(202, 0, 512)]).unwrap();
        assert_eq!(plan.needs, Needs { data: 4, tables: 1, ..Needs::default() });
        assert_eq!((plan.needs.single(), plan.committed), (5, 5 * 512 - 312));
        let written = backing.mapping.l2_entry(&backing.image, GuestCluster(202)).unwrap().entry;
        assert_eq!(written, L2Entry::Unallocated);
        assert!(!plan.touched.nothing() && io.log.is_empty());
    }

    #[test]
    fn what_a_snapshot_shares_is_replaced() {
        let spec = Spec { snapshots: 1, ..Spec::new(9, 300 << 9) }.with([(3, State::Data(1)), (4, State::Data(2))]);
        let (mut io, mut backing, mut plan) = parts(&spec);
        plan.window(&mut io, &mut backing, &[data(3, 0, 100), data(4, 0, 100)]).unwrap();
        assert_eq!(plan.needs, Needs { data: 2, tables: 1, ..Needs::default() });
    }

    #[test]
    fn an_entry_that_points_to_metadata_is_refused() {
        let (mut io, mut backing, mut plan) = parts(&Spec::new(9, 300 << 9).with([(3, State::Data(1))]));
        backing.load_mapping(&mut io, &[data(3, 0, 512)]).unwrap();
        let at = backing.mapping.l2_position(&backing.image, GuestCluster(3)).unwrap().unwrap();
        // The refcount table.
        let entry = L2Entry::Data { offset: backing.image.header.refcount_table, copied: true };
        backing.mapping.l2.set_entry(at, entry.encode()).unwrap();
        let error = plan.window(&mut io, &mut backing, &[data(3, 0, 512)]).unwrap_err();
        assert!(error.text.contains("which is metadata") && error.code == backing.image.corrupt_code(), "{error}");
    }
}
