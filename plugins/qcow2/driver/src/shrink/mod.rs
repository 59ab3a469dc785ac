//! Shrinking an image.
//!
//! The size, and which L1 table with how many entries counts, stand within one sector of the header ("Header", bytes 24 to 47):
//! one write switches all of them. Where the new end lies between clusters that one L2 table maps, that table gets a copy without
//! the entries past the end, and the L1 table a copy that refers to it; nothing that the image refers to is changed.
//!
//! Everything is verified and counted in [`Shrink::plan`]. The first write then goes this way, with the crash that each step
//! survives:
//!
//! 1. The copies of both tables, if they are needed, in new clusters, in the order of [`window`](crate::write::window), *then a
//!    flush*. A crash leaves leaks.
//! 2. The header: size, length and place of the L1 table, *then a flush*. A crash leaves an image of the old size, which reads as
//!    before, or one of the new size, which maps nothing past its end.
//! 3. What only the old tables referred to loses one reference, then the tables do. Internal snapshots keep their own references,
//!    and so their data. A crash leaves leaks.
//! 4. The rest of the last cluster becomes zero, where the image owns it alone. It lies past the end of the disk: no guest sees
//!    it. [`grow`](crate::grow) does not rely on it; other programs may.
//! 5. *A flush*, then the data file, if there is one, is cut behind the disk, and the file behind the last cluster that is in use. A crash leaves leaks, some of them perhaps past the
//!    end of the file.

mod dropped;

use crate::grow::room::find_room;
use crate::image::{overflow, Image};
use crate::metadata::bitmap_directory::BitmapDirectory;
use crate::metadata::entries::scan_l1_at;
use crate::metadata::l2_entry::Mapped;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::metadata::snapshot_table::SnapshotTable;
use crate::write::backing::Backing;
use crate::write::plan::Plan;
use alloc::format;
use dropped::Dropped;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{
    GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry, Version, L1_SIZE_FIELD, VIRTUAL_SIZE_FIELD,
};

/// QEMU takes no other virtual sizes than multiples of this, in bytes.
const SECTOR: u64 = 512;

/// What shrinking takes, once it was planned.
#[derive(Debug)]
pub(crate) struct Shrink {
    /// Entries that the L1 table keeps.
    entries: u32,
    /// What goes.
    dropped: Dropped,
    /// The L2 table that is copied, and how many of its bytes are kept.
    copied: Option<(HostOffset, u64)>,
    /// Host bytes of the last cluster that are past the end of the disk, where the image owns it alone.
    rest: Option<(HostOffset, u64)>,
}

impl Shrink {
    /// Verify that the image can be cut to `size` bytes, and count what that takes. From here on it counts as having the new
    /// size.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for a size that it cannot have, or for what cannot be cut; corruption; I/O errors.
    pub(crate) fn plan(io: &mut dyn BlockIo, backing: &mut Backing, plan: &mut Plan, size: u64) -> DriverResult<Self> {
        refuse_shrinking(io, &backing.image, size)?;
        let image = &backing.image;
        let cut = image.cluster_size().round_up(size).ok_or_else(|| overflow("the virtual size"))?;
        let coverage = image.header.l2_coverage();
        let entries = u32::try_from(size.div_ceil(coverage)).map_err(|_| overflow("the length of the L1 table"))?;
        let entries = entries.min(image.header.l1_entries);
        let (rest, l1_table, l1_entries) = (rest(io, image, size)?, image.header.l1_table, image.header.l1_entries);
        // Whatever the L1 table maps goes, past the end of the old disk, too.
        let mut dropped = Dropped::new(image.mapped_by(l1_table, l1_entries), cut);
        let last = dropped.verify(io, &mut backing.space.refcounts)?;
        let mut copied = None;
        let boundary = cut / coverage;
        scan_l1_at(io, &backing.image, l1_table, l1_entries.into(), &mut |index, _, table| {
            let kept = cut % coverage / backing.image.cluster_size().bytes() * backing.image.header.l2_entry_bytes();
            if index >= entries.into() {
                dropped.tables.push(table);
            } else if index == boundary && last.first.is_some_and(|guest| guest < (boundary + 1) * coverage) {
                copied = Some((table, kept));
                dropped.tables.push(table);
            }
            Ok(())
        })?;
        dropped.verify_tables(io, &mut backing.space.refcounts)?;
        if copied.is_some() {
            plan.needs.runs = backing.image.cluster_size().count_for(u64::from(entries) * 8) + 1;
            plan.needs.run_span = find_room(io, backing, plan.needs.runs)?;
        }
        backing.image.header.virtual_size = size;
        Ok(Self { entries, dropped, copied, rest })
    }

    /// Shrink: the steps at the top of this module. Durable when it returns.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn run(mut self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        let size = backing.image.cluster_size();
        let (old, old_bytes) = (backing.image.header.l1_table, backing.image.header.l1_bytes());
        let kept_bytes = u64::from(self.entries) * 8;
        let mut table = old;
        // Step 1.
        if let Some((l2_table, kept)) = self.copied {
            let clusters = size.count_for(kept_bytes);
            let first = backing.reserve_run(io, clusters + 1)?;
            table = backing.image.host_offset(first)?;
            let copy = backing.image.host_offset(HostCluster(first.0 + clusters))?;
            let entry = L1Entry::Table { offset: copy, copied: true }.encode();
            if kept_bytes > 8 {
                backing.out.copy(io, old.0, table.0, kept_bytes - 8)?;
            }
            backing.out.write(io, table.0 + kept_bytes - 8, &entry.to_be_bytes())?;
            backing.out.copy(io, l2_table.0, copy.0, kept)?;
            backing.publish(io)?;
            backing.space.referenced();
        }
        backing.flush(io)?;
        // Step 2.
        let header = &mut backing.image.header;
        (header.l1_table, header.l1_entries) = (table, self.entries);
        let mut field = [0; 24];
        field[..8].copy_from_slice(&header.virtual_size.to_be_bytes());
        field[8..12].copy_from_slice(&header.crypt_method.to_be_bytes());
        field[12..16].copy_from_slice(&header.l1_entries.to_be_bytes());
        field[16..].copy_from_slice(&header.l1_table.0.to_be_bytes());
        backing.write_field(io, VIRTUAL_SIZE_FIELD, &field)?;
        backing.mapping.l1.clear();
        backing.mapping.forget_l2();
        // Step 3.
        self.dropped.release(io, backing)?;
        let gone = if table == old { size.count_for(kept_bytes) } else { 0 };
        let first = size.host_cluster(old).0;
        let clusters = (first + gone..first + size.count_for(old_bytes)).map(HostCluster).collect();
        backing.release(io, clusters)?;
        // Step 4.
        if let Some((at, length)) = self.rest {
            let length = backing.image.data.map_or(length, |data| data.held(at.0, length));
            if length > 0 {
                backing.data_out().zero(io, at.0, length)?;
            }
        }
        // Step 5.
        backing.flush(io)?;
        cut_data_file(io, backing)?;
        cut_file(io, backing)
    }
}

/// Cut the data file behind the disk, as QEMU does. Nothing refers to what lies there.
fn cut_data_file(io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
    let size = backing.image.header.virtual_size;
    match &mut backing.image.data {
        Some(data) if data.file_length > size && !data.fixed_length => {
            data.file_length = size;
            backing.data_out.set_length(io, size)
        }
        _ => Ok(()),
    }
}

/// Cut the file behind the last cluster that is in use. A block device keeps its length.
fn cut_file(io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
    let image = &backing.image;
    let clusters = image.clustered_length() / image.cluster_size().bytes();
    let last = backing.space.refcounts.in_use(io, image, 0..clusters)?.last;
    let Some(end) = last.map(|last| image.host_offset(HostCluster(last.0 + 1))).transpose()? else { return Ok(()) };
    if end.0 < image.file_length && !image.fixed_length {
        backing.image.file_length = end.0;
        backing.out.set_length(io, end.0)?;
    }
    backing.flush(io)
}

/// What can be refused without a look at the mapping.
fn refuse_shrinking(io: &mut dyn BlockIo, image: &Image, size: u64) -> DriverResult<()> {
    let refused = |at, text: &str| {
        let text = format!("the image cannot shrink to {size} bytes: {text}");
        Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, at))
    };
    let header = &image.header;
    if !size.is_multiple_of(SECTOR) || size == 0 {
        return refused(VIRTUAL_SIZE_FIELD, "that is no multiple of 512 bytes, or too small");
    }
    if header.l1_entries == 0 {
        return refused(L1_SIZE_FIELD, "it has no L1 table");
    }
    // A snapshot without a size of its own is as large as the image ("Snapshots", extra data).
    let snapshots = SnapshotTable::read(io, image)?.entries;
    if snapshots.iter().any(|snapshot| header.version == Version::V2 || snapshot.virtual_size.is_none()) {
        return refused(60, "it has internal snapshots that do not record their size");
    }
    // The table of a bitmap has to be as long as the disk calls for, or QEMU does not open the image.
    let bitmaps = BitmapDirectory::read(io, image, &mut |_| Ok(()))?.entries;
    if let Some(entry) = bitmaps.iter().find(|entry| !entry.bitmap.in_use) {
        return refused(
            entry.at,
            "it has persistent bitmaps, which would have to be cut, too: remove them with \
             `qemu-img bitmap --remove`, and make a full backup afterwards",
        );
    }
    Ok(())
}

/// Host bytes of the cluster in which the end at `size` lies that are past it, if the image owns that cluster alone.
fn rest(io: &mut dyn BlockIo, image: &Image, size: u64) -> DriverResult<Option<(HostOffset, u64)>> {
    let (cluster, within) = (image.cluster_size(), image.cluster_size().offset_in(size));
    if within == 0 {
        return Ok(None);
    }
    let last = GuestCluster(size >> cluster.bits()).0 << cluster.bits();
    let mut rest = None;
    MappedClusters::new(image).walk_range(io, image, last..last + 1, &mut |Mapped { entry, .. }| {
        if let L2Entry::Data { offset, copied: true } = entry {
            rest = Some((HostOffset(offset.0 + within), cluster.bytes() - within));
        }
        Ok(true)
    })?;
    Ok(rest)
}
