//! Planning: verify what a commit will touch in the backing, and count what it must allocate.
//!
//! Nothing is written here. Cost follows from what the overlay holds, not from the size of the backing: the L1 table and the
//! refcount table are walked whole, because data must not land on any metadata, and the L2 tables where [`cross_check`](crate::write::cross_check)
//! says so. An image with the dirty bit is different: all of its references are counted, and planning sees it as the repair will leave it.

use crate::check::repair::Repair;
use crate::check::verify::Verifier;
use crate::image::{overflow, Image};
use crate::metadata::l2_entry::Mapped;
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::refcount::blocks::CLUSTERS_PER_LOAD;
use crate::refcount::forecast::{Demand, Forecast};
use crate::refcount::free_clusters::FreeClusters;
use crate::refcount::in_use::InUse;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::enabled_bitmaps::Bitmaps;
use crate::write::sink::Qcow2Sink;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, PlanSummary};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{CompressedRange, HostCluster, HostOffset, L2Entry};

/// A cluster of the backing that an entry refers to.
struct Owned {
    cluster: HostCluster,
    copied: bool,
    /// Compressed clusters stand in it: any number of references is fine.
    compressed: bool,
    /// Byte offset of the entry that refers to it.
    at: u64,
}

impl Qcow2Sink {
    /// Before the first window: what can be refused from the header, and where all metadata is.
    pub(crate) fn prepare_plan(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.planned.metadata.is_none() {
            self.image.refuse_unwritable()?;
            // The repair has looked for all references, also from bitmaps, in the file as it is.
            if self.image.is_dirty() {
                let metadata = MetadataMap::build(io, &self.image, Vec::new())?;
                let mapped = &mut MappedClusters::new(&self.image);
                Verifier { image: &self.image, mapped, will_empty: false }.structure(io)?;
                let plan = Repair::plan(io, &self.image, &metadata)?;
                self.adopt(plan);
            }
            let (bitmaps, clusters) = Bitmaps::load(io, &self.image, &mut self.space.refcounts)?;
            self.bitmaps = bitmaps;
            self.planned.metadata = Some(MetadataMap::build(io, &self.image, clusters)?);
        }
        Ok(())
    }

    /// Go on with the image as a planned repair will leave it.
    fn adopt(&mut self, plan: Repair) {
        let Repair { image, space, l1, l2, outstanding, .. } = plan;
        (self.image, self.space, self.l1, self.l2) = (image, space, l1, l2);
        self.repair = Some(outstanding);
    }

    /// Verify and count one window.
    pub(crate) fn plan_window(&mut self, io: &mut dyn BlockIo, pieces: &[ClusterExtent]) -> DriverResult<()> {
        self.plan_bitmaps(io, pieces)?;
        self.load_mapping(io, pieces)?;
        let mut owned: Vec<Owned> = Vec::new();
        for group in pieces.chunk_by(|a, b| a.cluster == b.cluster) {
            let Some(first) = group.first() else { continue };
            let (l1_at, table_index) = self.l1_position(first.cluster);
            let table = self.l2_table(first.cluster)?;
            if let (Some((offset, copied)), true) = (table, self.planned.last_table != Some(table_index)) {
                let cluster = self.image.host_cluster(offset);
                owned.push(Owned { cluster, copied, compressed: false, at: l1_at });
                self.planned.touched_tables.insert(cluster);
                self.planned.last_table = Some(table_index);
            }
            let mapped = self.l2_entry(first.cluster)?;
            let Mapped { entry, at, .. } = mapped;
            if let Some((offset, copied)) = entry.host() {
                // The same cluster comes twice where an extent ends within it.
                if self.planned.last_cluster != Some(first.cluster) && self.planned.grown != Some(first.cluster) {
                    self.check_data_cluster(offset, mapped.data_end(&self.image), at)?;
                    owned.push(Owned { cluster: self.image.host_cluster(offset), copied, compressed: false, at });
                }
            }
            self.planned.last_cluster = Some(first.cluster);
            if let L2Entry::Compressed { descriptor } = entry {
                self.check_compressed(descriptor, at, &mut owned)?;
            }
            let action = self.action(group, &mapped);
            self.planned.committed += group.iter().map(|piece| piece.length).sum::<u64>();
            if let Some(descriptor) = action.decodes() {
                // What is needed of it must decode: afterwards it would be too late to say no.
                self.decode(io, first.cluster, descriptor)?;
            }
            self.planned.new_data += u64::from(action.allocates());
            let shared = table.is_some_and(|(_, copied)| !copied);
            if shared && entry.host().is_some_and(|(_, copied)| copied) {
                let text = "an L2 table that a snapshot shares claims a cluster for itself alone (COPIED)";
                return Err(self.image.corrupt(at, text));
            }
            if action.remaps() && (table.is_none() || shared) && self.planned.last_new_table != Some(table_index) {
                self.planned.new_tables += 1;
                self.planned.last_new_table = Some(table_index);
            }
        }
        self.check_owned(io, &mut owned)
    }

    /// A data cluster that an entry refers to: inside the file, not metadata, not used twice. `needed` bytes of it are
    /// the guest's.
    fn check_data_cluster(&mut self, offset: HostOffset, needed: u64, at: u64) -> DriverResult<()> {
        let image = &self.image;
        if !image.holds_cluster(offset) || !image.holds_bytes(offset, needed) {
            return Err(image.corrupt(at, format!("an L2 entry points to offset {offset}, past the end of the file")));
        }
        let cluster = image.host_cluster(offset);
        if self.planned.metadata.as_ref().is_some_and(|map| map.contains(cluster)) {
            return Err(image.corrupt(at, format!("an L2 entry points to offset {offset}, which is metadata")));
        }
        if !self.planned.touched.insert(cluster) || self.planned.touched_compressed.contains(cluster) {
            return Err(image.corrupt(at, format!("two L2 entries point to offset {offset}")));
        }
        Ok(())
    }

    /// A compressed cluster that an entry refers to: inside the file, not in metadata, not in the cluster of another
    /// entry.
    fn check_compressed(&mut self, descriptor: u64, at: u64, owned: &mut Vec<Owned>) -> DriverResult<()> {
        let image = &self.image;
        let range = CompressedRange::decode(descriptor, image.cluster_size());
        if range.last_sector().0 >= image.file_length {
            let text = format!("a compressed cluster at offset {} lies past the end of the file", range.offset);
            return Err(image.corrupt(at, text));
        }
        for cluster in range.host_clusters(image.cluster_size()) {
            let metadata = self.planned.metadata.as_ref().is_some_and(|map| map.contains(cluster));
            if metadata || self.planned.touched.contains(cluster) {
                let text = format!("a compressed cluster at offset {} overlaps another structure", range.offset);
                return Err(image.corrupt(at, text));
            }
            self.planned.touched_compressed.insert(cluster);
            owned.push(Owned { cluster, copied: false, compressed: true, at });
        }
        Ok(())
    }

    /// Clusters that will be changed in place must have refcount 1 and say so; those that a snapshot shares have more.
    fn check_owned(&mut self, io: &mut dyn BlockIo, owned: &mut [Owned]) -> DriverResult<()> {
        owned.sort_unstable_by_key(|o| o.cluster);
        for batch in owned.chunks(CLUSTERS_PER_LOAD) {
            self.space.refcounts.table.shrink(CLUSTERS_PER_LOAD);
            self.space.refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
            self.space.refcounts.load(io, &self.image, batch.iter().map(|o| o.cluster))?;
            for o in batch {
                let count = self.space.refcounts.get(&self.image, o.cluster)?;
                // With a snapshot, or with a count that a crash left too high: what is shared is not changed in place.
                let shared = count > 1 && !o.copied;
                let compressed = o.compressed && count > 0;
                if !shared && !compressed && (count != 1 || !o.copied) {
                    return Err(refcount_disagrees(&self.image, o, count));
                }
            }
        }
        Ok(())
    }

    /// The result of planning.
    pub(crate) fn summarise(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let single = self.planned.new_data + self.planned.new_tables;
        let allocates = single + self.planned.run_span > 0;
        if single > 0 && self.last_cluster_is_cut_data(io)? {
            self.refuse_lost_data(io)?;
        }
        let mut free = FreeClusters::default();
        if let Some(metadata) = self.planned.metadata.as_ref().filter(|_| single > 0) {
            // On a device, the allocator comes by what follows.
            let limit = if self.image.fixed_length { self.space.allocator.next() } else { HostCluster(u64::MAX) };
            free = FreeClusters::find(io, &self.image, &mut self.space.refcounts, metadata, single, limit)?;
        }
        let mut demand = Demand { span: self.planned.run_span, count: single.saturating_sub(free.count()) };
        let forecast = if self.image.fixed_length && allocates {
            let forecast = self.forecast(io, demand)?;
            self.space.free = self.cross_check(io, free, allocates)?;
            if self.space.free.count() + demand.count < single {
                let text = "a cluster with refcount 0 is in use: run `qemu-img check -r all` on it first";
                return Err(self.image.corrupt(self.image.header.refcount_table.0, text));
            }
            forecast
        } else {
            self.space.free = self.cross_check(io, free, allocates)?;
            demand.count = single - self.space.free.count();
            self.forecast(io, demand)?
        };
        if forecast.passed_over > 0 && !self.image.fixed_length {
            self.refuse_lost_data(io)?;
        }
        let end = forecast.end.0.checked_mul(self.image.cluster_size().bytes());
        let end = end.ok_or_else(|| overflow("the length of the backing"))?;
        if end > self.image.max_length && demand != Demand::default() {
            return Err(self.too_long(forecast.passed_over, end));
        }
        Ok(PlanSummary {
            final_length: end.max(if self.image.fixed_length { self.image.file_length } else { 0 }),
            new_data_clusters: self.planned.new_data,
            new_metadata_clusters: self.planned.new_tables + self.planned.new_runs,
            unread_tables: self.planned.unread_tables,
        })
    }

    /// What allocating comes to; on a device, the clusters concerned must be no metadata.
    fn forecast(&mut self, io: &mut dyn BlockIo, demand: Demand) -> DriverResult<Forecast> {
        let fixed = self.image.fixed_length;
        let (fresh, metadata) = (&mut self.planned.fresh, self.planned.metadata.as_ref());
        let mut overlap = None;
        let forecast =
            self.space.allocator.forecast(io, &self.image, &mut self.space.refcounts, demand, &mut |run| {
                if fixed {
                    let end = run.start.0 + run.count;
                    if metadata.is_some_and(|map| map.overlaps(run.start.0, end)) {
                        overlap = Some(run.start);
                    }
                    run.clusters().for_each(|cluster| {
                        fresh.insert(cluster);
                    });
                }
            })?;
        if let Some(first) = overlap {
            let offset = self.image.cluster_size().host_offset(first).unwrap_or_default();
            let text =
                format!("metadata at or after offset {offset} has refcount 0: run `qemu-img check -r all` on it first");
            return Err(self.image.corrupt(offset.0, text));
        }
        Ok(forecast)
    }

    /// Whether the file ends within a cluster that is in use and no metadata (which may well be cut short).
    pub(crate) fn last_cluster_is_cut_data(&mut self, io: &mut dyn BlockIo) -> DriverResult<bool> {
        let size = self.image.cluster_size();
        if size.offset_in(self.image.file_length) == 0 {
            return Ok(false);
        }
        let last = size.host_cluster(HostOffset(self.image.file_length));
        let metadata = self.planned.metadata.as_ref().is_some_and(|map| map.contains(last));
        Ok(!metadata && self.in_use(io, last.0, last.0 + 1)?.count != 0)
    }

    /// The file looks cut off, and is about to grow over what was lost, which would then read as zeroes, for ever and
    /// unnoticed. Only a walk of all L2 tables tells data that was lost from clusters that a crash leaked.
    pub(crate) fn refuse_lost_data(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let image = &self.image;
        MappedClusters::new(image).walk(io, image, 0, &mut |mapped| {
            let Mapped { guest, at, entry, .. } = mapped;
            let L2Entry::Data { offset, .. } = entry else { return Ok(true) };
            let needed = mapped.data_end(image);
            if image.holds_bytes(offset, needed) {
                return Ok(true);
            }
            Err(image.corrupt(
                at,
                format!(
                    "the file is cut off: the cluster of guest offset {guest}, at offset {offset}, lies past its end"
                ),
            ))
        })
    }

    /// Which of the clusters `first..end` have a refcount that is not 0.
    pub(crate) fn in_use(&mut self, io: &mut dyn BlockIo, first: u64, end: u64) -> DriverResult<InUse> {
        self.space.refcounts.in_use(io, &self.image, first..end)
    }

    /// The refusal of a plan that would make the file `end` bytes long: more than it may become.
    pub(crate) fn too_long(&self, passed_over: u64, end: u64) -> DriverError {
        if self.image.fixed_length {
            let missing = end - self.image.max_length.min(end);
            let text = format!("the device is too small: {missing} bytes are missing, enlarge it");
            return DriverError::new(ErrorCode::NoSpace, text).at(self.image.device, self.image.max_length);
        }
        if passed_over == 0 {
            return overflow("the length that the backing may have");
        }
        self.image.corrupt(
            48,
            format!("{passed_over} clusters past the end of the file have a refcount: run `qemu-img check -r leaks`"),
        )
    }
}

fn refcount_disagrees(image: &Image, owned: &Owned, count: u64) -> DriverError {
    let offset = image.cluster_size().host_offset(owned.cluster).unwrap_or_default();
    let flag = if owned.copied { "set" } else { "clear" };
    image
        .corrupt(owned.at, format!("the cluster at offset {offset} has refcount {count} and its COPIED flag is {flag}"))
}
