//! Growing a backing to the virtual size of a larger overlay.
//!
//! Until then a guest of the overlay reads zeroes past the backing's end; so it must be when the backing has grown and
//! the overlay is emptied, wherever the overlay holds nothing. What must not come to light: the rest of the last
//! cluster, and ancestors that are longer than the backing was. L2 entries past the end may be zero clusters, which a
//! crash of this very order leaves; anything else there is refused (QEMU leaves nothing there when it shrinks an image).
//!
//! Everything is verified and counted in [`Qcow2Sink::plan_growth`]. The first write then goes this way, with the crash
//! that each step survives:
//!
//! 1. The file is filled up to whole clusters, if it was cut short. A crash leaves a longer file.
//! 2. The L1 table, where it is too short ("Header", `l1_size`). In its own clusters, if there is room: what stands behind
//!    it is zeroed, *then a flush*; then `l1_size`, *then a flush*. Otherwise a new table is written whole, with
//!    refcounts in the order of [`window`](crate::write::window), *then a flush*; then `l1_size` and `l1_table_offset` (12
//!    bytes within one sector), *then a flush*; then the old table's clusters are freed. A crash leaves leaks, or a table
//!    that is longer than needed, which is valid.
//! 3. The tables of persistent bitmaps, see [`bitmaps`](crate::grow::bitmaps), whose bits are not to be used until
//!    step 6.
//! 4. What must not come to light becomes zero, in the order of [`window`](crate::write::window), *then a flush*. It lies past
//!    the end of the virtual disk: no guest sees any of it, and nothing but zero clusters is ever mapped there.
//! 5. The virtual size (8 bytes within one sector), *then a flush*. A crash before it leaves a backing of the old size, and
//!    running again, with growth allowed, does all this again; after it, one of the new size that reads zeroes past the
//!    old one, as the overlay saw it before.
//! 6. The bitmaps are good again.
//!
//! Only then data is written: so there is never data past the end of a virtual disk, which would come to light when
//! somebody gives up the commit and grows the backing later.

pub(crate) mod bitmaps;
pub(crate) mod planned;

use crate::grow::planned::{Growth, L1Growth};
use crate::image::overflow;
use crate::metadata::l2_entry::Mapped;
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::metadata::snapshot_table::SnapshotTable;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::enabled_bitmaps::Bitmaps;
use crate::write::sink::Qcow2Sink;

use alloc::format;
use alloc::vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, Content, DriverError, DriverResult, Extent, ReadBelow};
use instar_qcow2_format::{
    GuestCluster, HostCluster, L2Entry, Version, L1_SIZE_FIELD, MAX_L1_BYTES, VIRTUAL_SIZE_FIELD,
};

/// QEMU takes no other virtual sizes than multiples of this, in bytes.
const SECTOR: u64 = 512;

impl Qcow2Sink {
    /// Verify that the image can grow, and count what that takes. From here on it counts as having the new size.
    pub(crate) fn plan_growth(&mut self, io: &mut dyn BlockIo, size: u64, below: u64) -> DriverResult<()> {
        let old = self.image.header.virtual_size;
        if size <= old {
            return Ok(());
        }
        self.prepare_plan(io)?;
        self.refuse_growth(io, size, below)?;
        let mut grown = self.image.clone();
        grown.header.virtual_size = size;
        let (_, clusters) = Bitmaps::load(io, &self.image, &mut self.space.refcounts)?;
        self.planned.metadata = Some(MetadataMap::build(io, &grown, clusters)?);
        self.refuse_mapped_past_end(io, size)?;
        // The rest of a last cluster that was cut short is about to be the guest's. (A block device stays as it is.)
        let whole = self.image.clustered_length();
        let set_length = whole != self.image.file_length && whole <= self.image.max_length;
        if set_length {
            if self.last_cluster_is_cut_data(io)? {
                self.refuse_lost_data(io)?;
            }
            self.image.file_length = whole;
        }
        let (l1, l1_clusters) = self.plan_l1(io, size)?;
        let bitmaps = self.plan_bitmap_growth(io, size)?;
        self.planned.new_runs = l1_clusters + self.bitmap_table_clusters(&bitmaps);
        if self.planned.new_runs > 0 {
            self.find_room(io, self.planned.new_runs)?;
        }
        self.image.header.virtual_size = size;
        let zeroes = self.without_bitmaps(|sink| sink.plan_zeroes(io, old, below))?;
        self.growth = Some(Growth { set_length, l1, bitmaps, zeroes });
        Ok(())
    }

    /// What can be refused without a look at the mapping.
    fn refuse_growth(&self, io: &mut dyn BlockIo, size: u64, below: u64) -> DriverResult<()> {
        let refused = |at, text: &str| {
            let text = format!("the image cannot grow to {size} bytes: {text}");
            Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.image.device, at))
        };
        let header = &self.image.header;
        if !size.is_multiple_of(SECTOR) || size > i64::MAX as u64 {
            return refused(VIRTUAL_SIZE_FIELD, "that is no multiple of 512 bytes, or too large");
        }
        if size.div_ceil(header.l2_coverage()) > MAX_L1_BYTES / 8 {
            return refused(L1_SIZE_FIELD, "that needs larger clusters");
        }
        // A snapshot without a size of its own is as large as the image ("Snapshots", extra data).
        let snapshots = SnapshotTable::read(io, &self.image)?.entries;
        if snapshots.iter().any(|snapshot| header.version == Version::V2 || snapshot.virtual_size.is_none()) {
            return refused(60, "it has internal snapshots that do not record their size");
        }
        let end =
            self.image.cluster_size().round_up(header.virtual_size).ok_or_else(|| overflow("the virtual size"))?;
        if header.version == Version::V2 && size.min(below) > end {
            return refused(4, "its backing is longer, and version 2 has no zero clusters to hide that: run `qemu-img amend -o compat=1.1` \
                 on it first");
        }
        Ok(())
    }

    /// L2 entries past the end of the virtual disk: nothing but zero clusters.
    fn refuse_mapped_past_end(&self, io: &mut dyn BlockIo, size: u64) -> DriverResult<()> {
        let mut grown = self.image.clone();
        grown.header.virtual_size = size;
        let old = self.image.header.virtual_size;
        let from = self.image.cluster_size().round_up(old).ok_or_else(|| overflow("the virtual size"))?;
        if from >= grown.mapped_size() {
            return Ok(());
        }
        let image = &grown;
        MappedClusters::new(image).walk(io, image, from, &mut |mapped| {
            let Mapped { guest, at, entry, .. } = mapped;
            // Of extended entries perhaps only some subclusters: the others are unallocated.
            if matches!(entry, L2Entry::Zero { offset: None, .. }) {
                return Ok(true);
            }
            Err(image.corrupt(
                at,
                format!("guest offset {guest} is mapped, past the end of the virtual disk at {old} bytes"),
            ))
        })
    }

    /// How the L1 table grows, and how many new clusters that takes.
    fn plan_l1(&mut self, io: &mut dyn BlockIo, size: u64) -> DriverResult<(L1Growth, u64)> {
        let cluster_size = self.image.cluster_size();
        let header = &self.image.header;
        let entries = size.div_ceil(header.l2_coverage());
        let wanted = u32::try_from(entries).map_err(|_| overflow("the length of the L1 table"))?;
        if wanted <= header.l1_entries {
            return Ok((L1Growth::Stays, 0));
        }
        let (clusters, held) = (cluster_size.count_for(entries * 8), cluster_size.count_for(header.l1_bytes()));
        let first = cluster_size.host_cluster(header.l1_table).0;
        if held != 0 && self.in_use(io, first, first + held)?.count != held {
            return Err(self.image.corrupt(L1_SIZE_FIELD, "the L1 table is in use but has refcount 0"));
        }
        if clusters <= held && self.image.holds_bytes(self.image.header.l1_table, entries * 8) {
            return Ok((L1Growth::InPlace(wanted), 0));
        }
        Ok((L1Growth::Moves(wanted), clusters))
    }

    /// Let the allocator go on where `count` clusters follow each other that are free, with room for the refcount blocks
    /// that describe them, all within the reach of the refcount table or all past it. Clusters past the end of the file
    /// that have a refcount are leaks. What a device has before that is found by [`free_clusters`](crate::refcount::free_clusters).
    fn find_room(&mut self, io: &mut dyn BlockIo, count: u64) -> DriverResult<()> {
        let per_block = self.space.refcounts.per_block();
        let span = count + count / (per_block - 1).max(1) + 2;
        self.planned.run_span = span;
        let reach = self.space.refcounts.table_entries.saturating_mul(per_block);
        let mut looked_for_lost = self.image.fixed_length;
        loop {
            let first = self.space.allocator.next().0;
            let end = first.checked_add(span).ok_or_else(|| overflow("the length of the file"))?;
            let bytes = end.saturating_mul(self.image.cluster_size().bytes());
            let in_use = self.in_use(io, first, end)?;
            if in_use.count > 0 && !looked_for_lost {
                self.refuse_lost_data(io)?;
                looked_for_lost = true;
            }
            let too_long = bytes > self.image.max_length;
            if too_long && !self.image.fixed_length {
                return Err(self.too_long(in_use.count, bytes));
            }
            match in_use.last {
                // How much a device lacks is known once everything was counted.
                None if too_long => return Ok(()),
                Some(last) => self.space.allocator.skip_to(HostCluster(last.0 + 1)),
                None if first >= reach || end <= reach => return Ok(()),
                None => self.space.allocator.skip_to(HostCluster(reach)),
            }
        }
    }

    /// What has to be zero before the size changes: the rest of the last cluster, and clusters through which an ancestor
    /// would be seen. It is planned like an extent of the overlay.
    fn plan_zeroes(&mut self, io: &mut dyn BlockIo, old: u64, below: u64) -> DriverResult<Option<Extent>> {
        let size = self.image.cluster_size();
        let partial = size.offset_in(old) != 0;
        let last = GuestCluster(old >> size.bits());
        let visible = below > old;
        let mut end = if visible { below } else { old };
        end = size.round_up(end).unwrap_or(u64::MAX).min(self.image.header.virtual_size);
        if end <= old || (partial && !visible && self.is_unallocated(io, last)?) {
            return Ok(None);
        }
        let extent = Extent::zero(old, end - old);
        self.windows(io, &[extent], &mut |sink, io, pieces| sink.plan_window(io, pieces))?;
        // What the overlay holds of it comes by once more.
        self.planned.grown = partial.then_some(last);
        Ok(Some(extent))
    }

    /// Whether a cluster has no L2 entry.
    fn is_unallocated(&mut self, io: &mut dyn BlockIo, cluster: GuestCluster) -> DriverResult<bool> {
        let piece = ClusterExtent { cluster, start: 0, length: 0, content: Content::Zero };
        self.load_mapping(io, &[piece])?;
        Ok(self.l2_entry(cluster)?.entry == L2Entry::Unallocated)
    }

    /// The growth that was planned, if it is still to be done.
    pub(crate) fn grow_now(&mut self, io: &mut dyn BlockIo, below: &mut dyn ReadBelow) -> DriverResult<()> {
        let Some(growth) = self.growth.take() else { return Ok(()) };
        if !self.started {
            self.start(io)?;
        }
        // Step 1.
        if growth.set_length {
            self.out.set_length(io, self.image.file_length)?;
        }
        // Step 2.
        match growth.l1 {
            L1Growth::Stays => {}
            L1Growth::InPlace(entries) => self.lengthen_l1(io, entries)?,
            L1Growth::Moves(entries) => self.move_l1(io, entries)?,
        }
        // Step 3.
        self.lengthen_bitmap_tables(io, &growth.bitmaps)?;
        // Step 4.
        if let Some(zeroes) = growth.zeroes {
            self.without_bitmaps(|sink| {
                sink.windows(io, &[zeroes], &mut |sink, io, pieces| sink.write_window(io, pieces, below))
            })?;
        }
        self.flush(io)?;
        // Step 5.
        io.write(self.image.device, VIRTUAL_SIZE_FIELD, &self.image.header.virtual_size.to_be_bytes())?;
        io.flush(self.image.device)?;
        // Step 6.
        self.release_bitmap_tables(io, &growth.bitmaps)
    }

    /// What becomes zero past the end of the disk was never anything else to a guest: bitmaps do not record it.
    fn without_bitmaps<T>(&mut self, run: impl FnOnce(&mut Self) -> DriverResult<T>) -> DriverResult<T> {
        let recorded = core::mem::take(&mut self.bitmaps.recorded);
        let result = run(self);
        self.bitmaps.recorded = recorded;
        result
    }

    /// Step 2, where the table's own clusters have room.
    fn lengthen_l1(&mut self, io: &mut dyn BlockIo, entries: u32) -> DriverResult<()> {
        let device = self.image.device;
        let end = self.image.header.l1_table.0 + self.image.header.l1_bytes();
        let length = u64::from(entries - self.image.header.l1_entries) * 8;
        let mut behind = vec![0; usize::try_from(length).map_err(|_| overflow("the length of the L1 table"))?];
        io.read(device, end, &mut behind)?;
        if behind.iter().any(|&byte| byte != 0) {
            behind.fill(0);
            self.out.write(io, end, &behind)?;
        }
        self.flush(io)?;
        io.write(device, L1_SIZE_FIELD, &entries.to_be_bytes())?;
        io.flush(device)?;
        self.image.header.l1_entries = entries;
        self.l1.clear();
        Ok(())
    }

    /// Reserve clusters that follow each other, with refcount 1; they read as zeroes.
    pub(crate) fn reserve_run(&mut self, io: &mut dyn BlockIo, count: u64) -> DriverResult<HostCluster> {
        self.space.reserve_run(io, &mut self.image, &mut self.out, count)
    }

    /// Step 2, with a new table.
    fn move_l1(&mut self, io: &mut dyn BlockIo, entries: u32) -> DriverResult<()> {
        let size = self.image.cluster_size();
        let device = self.image.device;
        let (old, old_bytes) = (self.image.header.l1_table, self.image.header.l1_bytes());
        let count = size.count_for(u64::from(entries) * 8);
        let first = self.reserve_run(io, count)?;
        let new = size.host_offset(first).ok_or_else(|| overflow("a host offset"))?;
        if old_bytes != 0 {
            self.out.copy(io, old.0, new.0, old_bytes)?;
        }
        self.publish(io)?;
        let mut field = [0; 12];
        field[..4].copy_from_slice(&entries.to_be_bytes());
        field[4..].copy_from_slice(&new.0.to_be_bytes());
        self.space.referenced();
        io.write(device, L1_SIZE_FIELD, &field)?;
        io.flush(device)?;
        (self.image.header.l1_table, self.image.header.l1_entries) = (new, entries);
        self.l1.clear();
        let start = size.host_cluster(old).0;
        self.free(io, (start..start + size.count_for(old_bytes)).map(HostCluster).collect())
    }
}
