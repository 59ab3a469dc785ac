//! Verifying an overlay before it is committed.
//!
//! Every structure is where it may be, no host cluster is used twice, and nothing that is used has refcount
//! 0. A refcount that is too high is a leak and harms nobody. (Of an image with the dirty bit, refcounts mean nothing: what
//! will make them right is worked out in their place, see [`repair`](crate::repair).) Compressed clusters may share host clusters with
//! each other, with nothing else. Memory is bounded: see [`ClusterSet`](crate::cluster_set::ClusterSet).

use crate::cluster_set::ClusterSet;
use crate::image::{overflow, Image};
use crate::metadata_map::MetadataMap;
use crate::refcounts::{Refcounts, CLUSTERS_PER_LOAD};
use crate::repair::Repair;
use crate::scan::{scan_l1_at, scan_refcount_table};
use crate::snapshots::Snapshots;
use crate::source::{compressed_range, Mapped, Qcow2Source};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset, L2Entry};

/// Memory for the set of clusters with one reference, in bytes: at least 80 million clusters a pass.
const SET_BUDGET: usize = 12 << 20;
/// Memory for the set of clusters that hold compressed clusters, in bytes.
const COMPRESSED_BUDGET: usize = 4 << 20;
/// Memory for the set of L2 tables of snapshots that were walked, in bytes.
const TABLES_BUDGET: usize = 2 << 20;
/// At most this many compressed clusters are decoded before anything is changed. Of an image with more of them, one
/// that does not decode is found while it is committed: the overlay is intact then, the backing has changed.
const DECODED_CLUSTERS: usize = 1024;

/// The host clusters that were seen in one pass.
struct Seen {
    /// Those with one reference: metadata, and clusters of plain data.
    single: ClusterSet,
    /// Those with compressed clusters in them.
    compressed: ClusterSet,
}

impl Seen {
    fn new(floor: HostCluster) -> Self {
        Self { single: ClusterSet::new(floor, SET_BUDGET), compressed: ClusterSet::new(floor, COMPRESSED_BUDGET) }
    }

    /// Add a cluster with one reference; `false` if anything else is there.
    fn insert(&mut self, cluster: HostCluster) -> bool {
        self.single.insert(cluster) && !self.compressed.contains(cluster)
    }

    /// Add clusters that follow each other, with one reference each. Compressed clusters are added after all of them.
    fn insert_range(&mut self, first: HostCluster, count: u64) -> bool {
        self.single.insert_range(first, count)
    }

    /// Add a cluster that a compressed cluster touches; `false` if anything but compressed clusters is there.
    fn insert_compressed(&mut self, cluster: HostCluster) -> bool {
        self.compressed.insert(cluster);
        !self.single.contains(cluster)
    }

    /// Where the next pass begins: below it, both sets are complete.
    fn next_floor(&self) -> Option<HostCluster> {
        let floors = [self.single.next_floor(), self.compressed.next_floor()];
        floors.into_iter().flatten().min()
    }
}

impl Qcow2Source {
    /// Verify the whole image; returns the number of clusters that it holds.
    pub(crate) fn check_image(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty {
            self.image.refuse_unwritable()?;
        }
        let (clusters, compressed) = self.check_structure(io, will_empty)?;
        self.decode_all(io, &compressed)?;
        if will_empty && self.image.is_dirty() {
            let metadata = MetadataMap::build(io, &self.image, Vec::new())?;
            self.repair = Some(Repair::plan(io, &self.image, &metadata)?);
        }
        Ok(clusters)
    }

    /// Everything but the content of compressed clusters. Returns the number of clusters that the image holds, and guest
    /// offset and descriptor of the compressed ones, one more than will be decoded at most. Refcounts are looked at
    /// unless the dirty bit says that they mean nothing.
    pub(crate) fn check_structure(
        &mut self,
        io: &mut dyn BlockIo,
        will_empty: bool,
    ) -> DriverResult<(u64, Vec<(u64, u64)>)> {
        let mut floor = HostCluster(0);
        loop {
            let mut seen = Seen::new(floor);
            let mut compressed = Vec::new();
            // Of what is emptied cluster by cluster, entries past the end of the disk count, too: QEMU leaves the state
            // of a machine there.
            let beyond = will_empty && self.is_shared();
            self.add_metadata(io, &mut seen, beyond)?;
            let clusters = self.add_clusters(io, &mut seen, &mut compressed)?;
            if beyond {
                self.add_beyond(io, &mut seen)?;
            }
            if !self.image.is_dirty() {
                check_refcounts(io, &self.image, &seen.single, 1)?;
                check_refcounts(io, &self.image, &seen.compressed, 1)?;
                if will_empty {
                    // Emptying takes one reference away: a snapshot must have one of its own.
                    let shared = self.shared_with_snapshots(io, &seen.single)?;
                    check_refcounts(io, &self.image, &shared, 2)?;
                }
            }
            match seen.next_floor() {
                Some(next) => floor = next,
                None => return Ok((clusters, compressed)),
            }
        }
    }

    /// Header, refcount table and blocks, L1 table, L2 tables; those past the end of the disk only if `beyond`.
    fn add_metadata(&self, io: &mut dyn BlockIo, seen: &mut Seen, beyond: bool) -> DriverResult<()> {
        let header = &self.image.header;
        let (l1_table, l1_bytes) = (header.l1_table, header.l1_bytes());
        let (table, table_bytes) = (header.refcount_table, header.refcount_table_bytes());
        add_range(&self.image, seen, HostOffset(0), 1, "the header", 0)?;
        add_range(&self.image, seen, table, table_bytes, "the refcount table", 48)?;
        add_range(&self.image, seen, l1_table, l1_bytes, "the L1 table", 40)?;
        let image = &self.image;
        let snapshots = Snapshots::read(io, image)?;
        if snapshots.table_bytes != 0 {
            add_range(image, seen, image.header.snapshot_table, snapshots.table_bytes, "the snapshot table", 64)?;
        }
        for snapshot in snapshots.entries.iter().filter(|snapshot| snapshot.l1_entries != 0) {
            let bytes = u64::from(snapshot.l1_entries) * 8;
            add_range(image, seen, snapshot.l1_table, bytes, "the L1 table of a snapshot", snapshot.l1_table.0)?;
        }
        scan_refcount_table(io, image, &mut |index, at, block| {
            add_one(image, seen, block, at, || format!("refcount block {index}"))
        })?;
        let entries = if beyond { u64::from(header.l1_entries) } else { image.used_l1_entries() };
        scan_l1_at(io, image, l1_table, entries, &mut |index, at, table| {
            add_one(image, seen, table, at, || format!("L2 table {index}"))
        })
    }

    /// Everything that L2 entries past the end of the virtual disk refer to.
    fn add_beyond(&self, io: &mut dyn BlockIo, seen: &mut Seen) -> DriverResult<()> {
        let header = &self.image.header;
        let view = self.image.mapped_by(header.l1_table, header.l1_entries);
        let from = self.image.cluster_size().round_up(header.virtual_size);
        let from = from.ok_or_else(|| overflow("the virtual size"))?;
        Self::new(view).walk(io, from, &mut |image, mapped| {
            let Mapped { guest, at, entry, .. } = mapped;
            if let L2Entry::Compressed { descriptor } = entry {
                add_compressed(image, seen, guest, at, descriptor)?;
            }
            if let Some((offset, _)) = entry.host() {
                if !image.holds_cluster(offset) {
                    let text = format!(
                        "an L2 entry past the end of the disk points to offset {offset}, which is not in the file"
                    );
                    return Err(image.corrupt(at, text));
                }
                add_one(image, seen, offset, at, || format!("the cluster of guest offset {guest}"))?;
            }
            Ok(true)
        })
    }

    /// Which of these clusters internal snapshots refer to as well.
    fn shared_with_snapshots(&self, io: &mut dyn BlockIo, active: &ClusterSet) -> DriverResult<ClusterSet> {
        let size = self.image.cluster_size();
        let mut shared = ClusterSet::new(HostCluster(0), SET_BUDGET);
        let mut tables = Some(ClusterSet::new(HostCluster(0), TABLES_BUDGET));
        for snapshot in Snapshots::read(io, &self.image)?.entries {
            let mut add = |offset: HostOffset| {
                let cluster = size.host_cluster(offset);
                if active.contains(cluster) {
                    shared.insert(cluster);
                }
            };
            let entries = u64::from(snapshot.l1_entries);
            scan_l1_at(io, &self.image, snapshot.l1_table, entries, &mut |_, _, table| {
                add(table);
                Ok(())
            })?;
            // The image as it was: all that its L1 table maps, but for the tables that an earlier snapshot has as well.
            let view = self.image.mapped_by(snapshot.l1_table, snapshot.l1_entries);
            let seen = tables.take().unwrap_or_else(|| ClusterSet::new(HostCluster(0), TABLES_BUDGET));
            let mut walker = Self::past_tables(view, seen);
            walker.walk(io, 0, &mut |_, mapped| {
                mapped.entry.host().into_iter().for_each(|(offset, _)| add(offset));
                Ok(true)
            })?;
            tables = walker.into_seen_tables();
        }
        Ok(shared)
    }

    /// Everything that L2 entries refer to; returns the number of clusters that the image holds. Guest offsets and
    /// descriptors of compressed clusters are appended to `compressed`, one more than will be decoded at most.
    fn add_clusters(
        &mut self,
        io: &mut dyn BlockIo,
        seen: &mut Seen,
        compressed: &mut Vec<(u64, u64)>,
    ) -> DriverResult<u64> {
        let mut clusters = 0;
        self.walk(io, 0, &mut |image, mapped| {
            let Mapped { guest, at, entry, .. } = mapped;
            if let L2Entry::Compressed { descriptor } = entry {
                add_compressed(image, seen, guest, at, descriptor)?;
                if compressed.len() <= DECODED_CLUSTERS {
                    compressed.push((guest, descriptor));
                }
            }
            clusters += 1;
            if let Some((offset, _)) = entry.host() {
                let needed = mapped.data_end(image);
                if !image.holds_cluster(offset) || !image.holds_bytes(offset, needed) {
                    return Err(image.corrupt(
                        at,
                        format!(
                            "the L2 entry of guest offset {guest} points to offset {offset}, past the end of the file"
                        ),
                    ));
                }
                add_one(image, seen, offset, at, || format!("the cluster of guest offset {guest}"))?;
            }
            Ok(true)
        })?;
        Ok(clusters)
    }

    /// Decode these compressed clusters, unless they are too many; the bytes are dropped.
    fn decode_all(&mut self, io: &mut dyn BlockIo, compressed: &[(u64, u64)]) -> DriverResult<()> {
        if compressed.is_empty() || compressed.len() > DECODED_CLUSTERS {
            return Ok(());
        }
        let size = usize::try_from(self.image.cluster_size().bytes()).map_err(|_| overflow("the cluster size"))?;
        let mut buffer = vec![0; size];
        compressed.iter().try_for_each(|&cluster| self.reader.read(io, &self.image, cluster, 0, &mut buffer))
    }
}

fn add_compressed(image: &Image, seen: &mut Seen, guest: u64, at: u64, descriptor: u64) -> DriverResult<()> {
    let range = compressed_range(image, guest, at, descriptor)?;
    for cluster in range.host_clusters(image.cluster_size()) {
        if !seen.insert_compressed(cluster) {
            return Err(image.corrupt(
                at,
                format!(
                    "the compressed cluster of guest offset {guest} at offset {} overlaps another structure",
                    range.offset
                ),
            ));
        }
    }
    Ok(())
}

fn add_one(
    image: &Image,
    seen: &mut Seen,
    offset: HostOffset,
    at: u64,
    what: impl Fn() -> alloc::string::String,
) -> DriverResult<()> {
    if seen.insert(image.host_cluster(offset)) {
        return Ok(());
    }
    Err(image.corrupt(at, format!("{} at offset {offset} overlaps another structure", what())))
}

fn add_range(image: &Image, seen: &mut Seen, offset: HostOffset, bytes: u64, what: &str, at: u64) -> DriverResult<()> {
    let size = image.cluster_size();
    if seen.insert_range(size.host_cluster(offset), size.count_for(bytes)) {
        return Ok(());
    }
    Err(image.corrupt(at, format!("{what} at offset {offset} overlaps another structure")))
}

/// Every cluster of the set must have this refcount at least.
fn check_refcounts(io: &mut dyn BlockIo, image: &Image, set: &ClusterSet, least: u64) -> DriverResult<()> {
    let mut refcounts = Refcounts::new(image);
    let mut clusters = set.iter();
    loop {
        let batch: Vec<HostCluster> = clusters.by_ref().take(CLUSTERS_PER_LOAD).collect();
        if batch.is_empty() {
            return Ok(());
        }
        refcounts.table.shrink(CLUSTERS_PER_LOAD);
        refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        refcounts.load(io, image, batch.iter().copied())?;
        for &cluster in &batch {
            let count = refcounts.get(image, cluster)?;
            if count < least {
                let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
                let users = if least == 1 { "in use" } else { "in use, by a snapshot as well," };
                return Err(image
                    .corrupt(offset.0, format!("the cluster at offset {offset} is {users} but has refcount {count}")));
            }
        }
    }
}
