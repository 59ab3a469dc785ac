//! Verifying an overlay before it is committed.
//!
//! Every structure is where it may be, no host cluster is used twice but by compressed clusters, and no refcount is lower
//! than the number of references; where snapshots or bitmaps stay when the overlay is emptied, theirs are counted, too. A
//! refcount that is too high is a leak and harms nobody. (Of an image with the dirty bit, refcounts mean nothing: what
//! will make them right is worked out in their place, see [`repair`](crate::check::repair).) Compressed clusters may share
//! host clusters with each other, with nothing else. Memory is bounded: see
//! [`ClusterSet`](crate::references::cluster_set::ClusterSet).

use crate::check::repair::Repair;
use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::metadata::l2_entry::{compressed_range, Mapped};
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::metadata::reference::{Reference, Structure};
use crate::metadata::structures::{Kinds, Structures};
use crate::read::compressed::CompressedReader;
use crate::refcount::blocks::Refcounts;
use crate::references::calculated::CalculatedRefcounts;
use crate::references::cluster_set::ClusterSet;
use crate::references::compare::refuse_too_few;
use crate::references::walk::each_pass;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Display;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{HostCluster, HostOffset, L2Entry};

/// Memory for the set of clusters with one reference, in bytes: at least 80 million clusters a pass.
const SET_BUDGET: usize = 12 << 20;
/// Memory for the counts of compressed clusters, in bytes: about a million clusters a pass.
const COMPRESSED_BUDGET: usize = 4 << 20;
/// At most this many compressed clusters are decoded before anything is changed. Of an image with more of them, one
/// that does not decode is found while it is committed: the overlay is intact then, the backing has changed.
const DECODED_CLUSTERS: usize = 1024;

/// The host clusters that were seen in one pass.
struct Seen {
    /// Those with one reference: metadata, and clusters of plain data.
    single: ClusterSet,
    /// How many compressed clusters touch those that hold any.
    compressed: CalculatedRefcounts,
}

impl Seen {
    fn new(floor: HostCluster) -> Self {
        Self {
            single: ClusterSet::new(floor, SET_BUDGET),
            compressed: CalculatedRefcounts::new(floor, COMPRESSED_BUDGET),
        }
    }

    /// Add a cluster with one reference; `false` if anything else is there.
    fn insert(&mut self, cluster: HostCluster) -> bool {
        self.single.insert(cluster) && self.compressed.get(cluster).is_none_or(|count| count == 0)
    }

    /// Add clusters that follow each other, with one reference each. Compressed clusters are added after all of them.
    fn insert_run(&mut self, run: ClusterRun) -> bool {
        self.single.insert_range(run.start, run.count)
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

/// What verifying an image has found out.
pub(crate) struct Verified {
    /// Clusters of the guest that the image holds.
    pub(crate) clusters: u64,
    /// What has to be repaired before the image is emptied.
    pub(crate) repair: Option<Repair>,
}

/// Verify the whole image; if it is to be emptied (`will_empty`), also what is left then. The compressed clusters are read
/// by `reader`, as far as they are decoded.
///
/// # Errors
/// Corruption; a feature that forbids changing the image that is to be emptied; I/O errors.
pub(crate) fn verify(
    io: &mut dyn BlockIo,
    image: &Image,
    (mapped, reader): (&mut MappedClusters, &mut CompressedReader),
    will_empty: bool,
) -> DriverResult<Verified> {
    if will_empty {
        image.refuse_unwritable()?;
    }
    let mut verifier = Verifier { image, mapped, will_empty };
    let (clusters, compressed) = verifier.structure(io)?;
    if will_empty && image.is_shared() && !image.is_dirty() {
        verifier.references(io)?;
    }
    verifier.decode_all(io, reader, &compressed)?;
    let mut repair = None;
    if will_empty && image.is_dirty() {
        let metadata = MetadataMap::build(io, image, Vec::new())?;
        repair = Some(Repair::plan(io, image, &metadata)?);
    }
    Ok(Verified { clusters, repair })
}

/// Verifies the structure of one image.
pub(crate) struct Verifier<'a> {
    pub(crate) image: &'a Image,
    pub(crate) mapped: &'a mut MappedClusters,
    /// What is left when the image is emptied counts, too.
    pub(crate) will_empty: bool,
}

impl Verifier<'_> {
    /// Everything but the content of compressed clusters. Returns the number of clusters that the image holds, and guest
    /// offset and descriptor of the compressed ones, one more than will be decoded at most. Refcounts are looked at
    /// unless the dirty bit says that they mean nothing.
    ///
    /// # Errors
    /// Corruption; I/O errors.
    pub(crate) fn structure(&mut self, io: &mut dyn BlockIo) -> DriverResult<(u64, Vec<(u64, u64)>)> {
        let mut floor = HostCluster(0);
        loop {
            let mut seen = Seen::new(floor);
            let mut compressed = Vec::new();
            // Of what is emptied cluster by cluster, entries past the end of the disk count, too: QEMU leaves the state
            // of a machine there.
            let beyond = self.will_empty && self.image.is_shared();
            self.add_metadata(io, &mut seen, beyond)?;
            let clusters = self.add_clusters(io, &mut seen, &mut compressed)?;
            if beyond {
                self.add_beyond(io, &mut seen)?;
            }
            if !self.image.is_dirty() {
                let mut refcounts = Refcounts::new(self.image);
                let mut single = seen.single.iter().map(|cluster| (cluster, 1));
                refuse_too_few(io, self.image, &mut refcounts, &mut single)?;
                refuse_too_few(io, self.image, &mut refcounts, &mut seen.compressed.iter())?;
            }
            match seen.next_floor() {
                Some(next) => floor = next,
                None => return Ok((clusters, compressed)),
            }
        }
    }

    /// Everything that is no bitmap and not referred to by L2 entries; tables past the end of the disk only if `beyond`.
    fn add_metadata(&self, io: &mut dyn BlockIo, seen: &mut Seen, beyond: bool) -> DriverResult<()> {
        let tables = if beyond { Kinds::ACTIVE_L2 } else { Kinds::MAPPED_L2 };
        let kinds = Kinds::HEADER | Kinds::SNAPSHOTS | Kinds::REFCOUNT_BLOCKS | tables;
        Structures::new(self.image).visit(io, kinds, &mut |reference| {
            let Reference { structure, offset, run, at, .. } = reference;
            if seen.insert_run(run) {
                return Ok(());
            }
            let at = if let Structure::InactiveL1(_) = structure { offset.0 } else { at };
            Err(overlaps(self.image, offset, at, structure))
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
            if let Some((offset, _)) = image.own_host(entry) {
                if !image.holds_cluster(offset) {
                    let text = format!(
                        "an L2 entry past the end of the disk points to offset {offset}, which is not in the file"
                    );
                    return Err(image.corrupt(at, text));
                }
                add_one(image, seen, offset, at, guest)?;
            }
            Ok(true)
        })
    }

    /// Emptying takes the references of the active state away, cluster by cluster, and cuts the file behind the last
    /// cluster that has any left: what snapshots and bitmaps refer to must have been counted.
    fn references(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let metadata = MetadataMap::build(io, self.image, Vec::new())?;
        let mut refcounts = Refcounts::new(self.image);
        each_pass(io, &mut Structures::new(self.image), &metadata, &mut |io, counts| {
            refuse_too_few(io, self.image, &mut refcounts, &mut counts.iter())
        })
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
        let image = self.image;
        self.mapped.walk(io, image, 0, &mut |mapped| {
            let Mapped { guest, at, entry, .. } = mapped;
            if let L2Entry::Compressed { descriptor } = entry {
                add_compressed(image, seen, guest, at, descriptor)?;
                if compressed.len() <= DECODED_CLUSTERS {
                    compressed.push((guest, descriptor));
                }
            }
            clusters += 1;
            if let Some((offset, _)) = image.own_host(entry) {
                let needed = mapped.data_end(image);
                if !image.holds_cluster(offset) || !image.holds_bytes(offset, needed) {
                    return Err(image.corrupt(
                        at,
                        format!(
                            "the L2 entry of guest offset {guest} points to offset {offset}, past the end of the file"
                        ),
                    ));
                }
                add_one(image, seen, offset, at, guest)?;
            }
            Ok(true)
        })?;
        Ok(clusters)
    }

    /// Decode these compressed clusters, unless they are too many; the bytes are dropped.
    fn decode_all(
        &self,
        io: &mut dyn BlockIo,
        reader: &mut CompressedReader,
        compressed: &[(u64, u64)],
    ) -> DriverResult<()> {
        if compressed.is_empty() || compressed.len() > DECODED_CLUSTERS {
            return Ok(());
        }
        let size = usize::try_from(self.image.cluster_size().bytes()).map_err(|_| overflow("the cluster size"))?;
        let mut buffer = vec![0; size];
        compressed.iter().try_for_each(|&cluster| reader.read(io, self.image, cluster, 0, &mut buffer))
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

fn add_one(image: &Image, seen: &mut Seen, offset: HostOffset, at: u64, guest: u64) -> DriverResult<()> {
    if seen.insert(image.host_cluster(offset)) {
        return Ok(());
    }
    Err(overlaps(image, offset, at, format_args!("the cluster of guest offset {guest}")))
}

/// The corruption of what stands at `offset`, to which byte `at` refers.
fn overlaps(image: &Image, offset: HostOffset, at: u64, what: impl Display) -> DriverError {
    image.corrupt(at, format!("{what} at offset {offset} overlaps another structure"))
}
