//! Verifying an overlay before it is committed.
//!
//! Every structure is where it may be, no host cluster is used twice but by compressed clusters, and no refcount is lower
//! than the number of references; where snapshots or bitmaps stay when the overlay is emptied, theirs are counted, too.
//! A refcount that is too high is a leak and harms nobody. (Of an image with the dirty bit, refcounts mean nothing: what
//! will make them right is worked out in their place, see [`repair`](crate::repair).) Compressed clusters may share host clusters with
//! each other, with nothing else. Memory is bounded: see [`ClusterSet`](crate::cluster_set::ClusterSet).

use crate::cluster_set::ClusterSet;
use crate::image::{overflow, Image};
use crate::l2_entry::{compressed_range, Mapped};
use crate::mapped_clusters::MappedClusters;
use crate::metadata_map::MetadataMap;
use crate::refcounts::Refcounts;
use crate::reference_counts::ReferenceCounts;
use crate::references::{refuse_too_few, References};
use crate::repair::Repair;
use crate::scan::{scan_l1_at, scan_refcount_table};
use crate::snapshots::Snapshots;
use crate::source::Qcow2Source;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset, L2Entry};

/// Memory for the set of clusters with one reference, in bytes: at least 80 million clusters a pass.
const SET_BUDGET: usize = 12 << 20;
/// Memory for the counts of compressed clusters, in bytes: about a million clusters a pass.
const COMPRESSED_BUDGET: usize = 4 << 20;
/// Memory for the counts of one pass over everything, in bytes: dense, about four million clusters.
const COUNT_BUDGET: usize = 16 << 20;
/// At most this many compressed clusters are decoded before anything is changed. Of an image with more of them, one
/// that does not decode is found while it is committed: the overlay is intact then, the backing has changed.
const DECODED_CLUSTERS: usize = 1024;

/// The host clusters that were seen in one pass.
struct Seen {
    /// Those with one reference: metadata, and clusters of plain data.
    single: ClusterSet,
    /// How many compressed clusters touch those that hold any.
    compressed: ReferenceCounts,
}

impl Seen {
    fn new(floor: HostCluster) -> Self {
        Self { single: ClusterSet::new(floor, SET_BUDGET), compressed: ReferenceCounts::new(floor, COMPRESSED_BUDGET) }
    }

    /// Add a cluster with one reference; `false` if anything else is there.
    fn insert(&mut self, cluster: HostCluster) -> bool {
        self.single.insert(cluster) && self.compressed.get(cluster).is_none_or(|count| count == 0)
    }

    /// Add clusters that follow each other, with one reference each. Compressed clusters are added after all of them.
    fn insert_range(&mut self, first: HostCluster, count: u64) -> bool {
        self.single.insert_range(first, count)
    }

    /// Add a cluster that a compressed cluster touches; `false` if anything but compressed clusters is there.
    fn insert_compressed(&mut self, cluster: HostCluster) -> bool {
        self.compressed.add(cluster, 1) && !self.single.contains(cluster)
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
        if will_empty && self.is_shared() && !self.image.is_dirty() {
            self.check_references(io)?;
        }
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
                let mut refcounts = Refcounts::new(&self.image);
                let mut single = seen.single.iter().map(|cluster| (cluster, 1));
                refuse_too_few(io, &self.image, &mut refcounts, &mut single)?;
                refuse_too_few(io, &self.image, &mut refcounts, &mut seen.compressed.iter())?;
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
        let image = &view;
        MappedClusters::new(image).walk(io, image, from, &mut |mapped| {
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

    /// Emptying takes the references of the active state away, cluster by cluster, and cuts the file behind the last cluster
    /// that has any left: what snapshots and bitmaps refer to must have been counted.
    fn check_references(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let metadata = MetadataMap::build(io, &self.image, Vec::new())?;
        let references = References::new(io, &self.image, &metadata)?;
        let mut refcounts = Refcounts::new(&self.image);
        let mut floor = HostCluster(0);
        loop {
            let mut counts = ReferenceCounts::new(floor, COUNT_BUDGET.min(io.heap_free() / 3));
            references.count(io, &mut counts)?;
            refuse_too_few(io, &self.image, &mut refcounts, &mut counts.iter())?;
            match counts.next_floor() {
                Some(next) => floor = next,
                None => return Ok(()),
            }
        }
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
        let image = &self.image;
        self.mapped.walk(io, image, 0, &mut |mapped| {
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
