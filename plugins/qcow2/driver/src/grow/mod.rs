//! Growing a backing to the virtual size of a larger overlay.
//!
//! Until then a guest of the overlay reads zeroes past the backing's end; so it must be when the backing has grown and
//! the overlay is emptied, wherever the overlay holds nothing. What must not come to light: the rest of the last
//! cluster, and ancestors that are longer than the backing was. L2 entries past the end may be zero clusters, which a
//! crash of this very order leaves; anything else there is refused (QEMU leaves nothing there when it shrinks an image).
//!
//! Everything is verified and counted in [`Growth::plan`]. The first write then goes this way, with the crash
//! that each step survives:
//!
//! 1. The file is filled up to whole clusters, if it was cut short. A crash leaves a longer file.
//! 2. The L1 table, where it is too short ("Header", `l1_size`). In its own clusters, if there is room: what stands behind
//!    it is zeroed, *then a flush*; then `l1_size`, *then a flush*. Otherwise a new table is written whole, with
//!    refcounts in the order of [`window`](crate::write::window), *then a flush*; then `l1_size` and `l1_table_offset` (12
//!    bytes within one sector), *then a flush*; then the old table's clusters are freed. A crash leaves leaks, or a table
//!    that is longer than needed, which is valid.
//! 3. The tables of persistent bitmaps, see [`bitmaps`], whose bits are not to be used until
//!    step 6.
//! 4. What must not come to light becomes zero, in the order of [`window`](crate::write::window), *then a flush*. It lies
//!    past the end of the virtual disk: no guest sees any of it, and nothing but zero clusters is ever mapped there.
//!    A data file becomes as long as the disk, if it is shorter, as for QEMU; one that is raw is zeroed from the old end on.
//! 5. The virtual size (8 bytes within one sector), *then a flush*. A crash before it leaves a backing of the old size,
//!    and running again, with growth allowed, does all this again; after it, one of the new size that reads zeroes past
//!    the old one, as the overlay saw it before.
//! 6. The bitmaps are good again.
//!
//! Only then data is written: so there is never data past the end of a virtual disk, which would come to light when
//! somebody gives up the commit and grows the backing later.

pub(crate) mod bitmaps;
pub(crate) mod l1;
pub(crate) mod room;

use crate::image::{overflow, Image};
use crate::metadata::l2_entry::Mapped;
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::metadata::snapshot_table::SnapshotTable;
use crate::write::backing::Backing;
use crate::write::enabled_bitmaps::EnabledBitmaps;
use crate::write::lost_data::{last_cluster_is_cut_data, refuse_lost_data};
use crate::write::plan::Plan;
use crate::write::window::write_window;
use crate::write::windows::Windows;
use alloc::format;
use bitmaps::BitmapTables;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Extent, ReadBelow};
use instar_qcow2_format::{GuestCluster, L2Entry, Version, L1_SIZE_FIELD, MAX_L1_BYTES, VIRTUAL_SIZE_FIELD};
use l1::L1Growth;
use room::find_room;

/// QEMU takes no other virtual sizes than multiples of this, in bytes.
const SECTOR: u64 = 512;

/// What growing takes, once it was planned.
#[derive(Debug)]
pub(crate) struct Growth {
    /// The file has to become as long as the image says.
    set_length: bool,
    l1: L1Growth,
    bitmaps: BitmapTables,
    /// Guest bytes that must become zero.
    zeroes: Option<Extent>,
    /// Bytes of the disk before.
    old: u64,
}

impl Growth {
    /// Verify that the image can grow to `size` bytes, what lies below it being `below` bytes long, and count what that
    /// takes. From here on it counts as having the new size.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for a size that it cannot have; corruption; I/O errors.
    pub(crate) fn plan(
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        recorded: &mut EnabledBitmaps,
        plan: &mut Plan,
        (size, below): (u64, u64),
    ) -> DriverResult<Self> {
        let old = backing.image.header.virtual_size;
        refuse_growth(io, &backing.image, size, below)?;
        let mut grown = backing.image.clone();
        grown.header.virtual_size = size;
        let (_, clusters) = EnabledBitmaps::load(io, &backing.image, &mut backing.space.refcounts)?;
        plan.metadata = MetadataMap::build(io, &grown, clusters)?;
        refuse_mapped_past_end(io, &backing.image, &grown)?;
        // The rest of a last cluster that was cut short is about to be the guest's. (A block device stays as it is.)
        let whole = backing.image.clustered_length();
        let set_length = whole != backing.image.file_length && whole <= backing.image.max_length;
        if set_length {
            if last_cluster_is_cut_data(io, backing, &plan.metadata)? {
                refuse_lost_data(io, &backing.image)?;
            }
            backing.image.file_length = whole;
        }
        let (l1, l1_clusters) = L1Growth::plan(io, backing, size)?;
        let bitmaps = BitmapTables::plan(io, &backing.image, recorded, size)?;
        plan.needs.runs = l1_clusters + bitmaps.clusters(backing.image.cluster_size());
        if plan.needs.runs > 0 {
            plan.needs.run_span = find_room(io, backing, plan.needs.runs)?;
        }
        if let Some(data) = backing.image.data.filter(|data| data.raw) {
            data.refuse_too_long(size)?;
        }
        backing.image.header.virtual_size = size;
        let zeroes = plan_zeroes(io, backing, plan, old, below)?;
        Ok(Self { set_length, l1, bitmaps, zeroes, old })
    }

    /// Grow: the steps at the top of this module. Durable when it returns, but for what is released.
    ///
    /// # Errors
    /// I/O errors, also of what is read `below`.
    pub(crate) fn run(
        self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        recorded: &mut EnabledBitmaps,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        // Step 1.
        if self.set_length {
            backing.out.set_length(io, backing.image.file_length)?;
        }
        // Step 2.
        self.l1.run(io, backing)?;
        // Step 3.
        self.bitmaps.lengthen(io, backing, recorded)?;
        // Step 4. What becomes zero past the end of the disk was never anything else to a guest: bitmaps do not record it.
        if let Some(zeroes) = self.zeroes {
            let extents = [zeroes];
            let mut windows = Windows::new(backing, &extents, false);
            while let Some(window) = windows.next(io, backing)? {
                write_window(io, backing, window, below)?;
            }
        }
        lengthen_data_file(io, backing, self.old)?;
        backing.flush(io)?;
        // Step 5.
        backing.write_field(io, VIRTUAL_SIZE_FIELD, &backing.image.header.virtual_size.to_be_bytes())?;
        // Step 6.
        self.bitmaps.release_old(io, backing)
    }
}

/// A data file is as long as the disk at least, and reads as zeroes past the `old` end if it is to be read by itself.
fn lengthen_data_file(io: &mut dyn BlockIo, backing: &mut Backing, old: u64) -> DriverResult<()> {
    let Some(data) = backing.image.data else { return Ok(()) };
    let size = backing.image.header.virtual_size;
    let stale = if data.raw { data.held(old, size.saturating_sub(old)) } else { 0 };
    if stale > 0 {
        backing.data_out.zero(io, old, stale)?;
    }
    if data.file_length < size && size <= data.max_length && !data.fixed_length {
        backing.writes_data(size);
        backing.data_out.set_length(io, size)?;
    }
    Ok(())
}

/// What can be refused without a look at the mapping.
fn refuse_growth(io: &mut dyn BlockIo, image: &Image, size: u64, below: u64) -> DriverResult<()> {
    let refused = |at, text: &str| {
        let text = format!("the image cannot grow to {size} bytes: {text}");
        Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, at))
    };
    let header = &image.header;
    if !size.is_multiple_of(SECTOR) || size > i64::MAX as u64 {
        return refused(VIRTUAL_SIZE_FIELD, "that is no multiple of 512 bytes, or too large");
    }
    if size.div_ceil(header.l2_coverage()) > MAX_L1_BYTES / 8 {
        return refused(L1_SIZE_FIELD, "that needs larger clusters");
    }
    // A snapshot without a size of its own is as large as the image ("Snapshots", extra data).
    let snapshots = SnapshotTable::read(io, image)?.entries;
    if snapshots.iter().any(|snapshot| header.version == Version::V2 || snapshot.virtual_size.is_none()) {
        return refused(60, "it has internal snapshots that do not record their size");
    }
    let end = image.cluster_size().round_up(header.virtual_size).ok_or_else(|| overflow("the virtual size"))?;
    if header.version == Version::V2 && size.min(below) > end {
        return refused(4, "its backing is longer, and version 2 has no zero clusters to hide that: run `qemu-img amend -o compat=1.1` \
             on it first");
    }
    Ok(())
}

/// L2 entries past the end of the virtual disk: nothing but zero clusters.
fn refuse_mapped_past_end(io: &mut dyn BlockIo, image: &Image, grown: &Image) -> DriverResult<()> {
    let old = image.header.virtual_size;
    let from = image.cluster_size().round_up(old).ok_or_else(|| overflow("the virtual size"))?;
    if from >= grown.mapped_size() {
        return Ok(());
    }
    MappedClusters::new(grown).walk(io, grown, from, &mut |mapped| {
        let Mapped { guest, at, entry, .. } = mapped;
        // Of extended entries perhaps only some subclusters: the others are unallocated.
        if matches!(entry, L2Entry::Zero { offset: None, .. }) {
            return Ok(true);
        }
        Err(image
            .corrupt(at, format!("guest offset {guest} is mapped, past the end of the virtual disk at {old} bytes")))
    })
}

/// What has to be zero before the size changes: the rest of the last cluster, and clusters through which an ancestor would
/// be seen. It is planned like an extent of the overlay, without bitmaps.
fn plan_zeroes(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    plan: &mut Plan,
    old: u64,
    below: u64,
) -> DriverResult<Option<Extent>> {
    let size = backing.image.cluster_size();
    let partial = size.offset_in(old) != 0;
    let last = GuestCluster(old >> size.bits());
    let visible = below > old;
    let mut end = if visible { below } else { old };
    end = size.round_up(end).unwrap_or(u64::MAX).min(backing.image.header.virtual_size);
    if end <= old || (partial && !visible && is_unallocated(io, backing, last)?) {
        return Ok(None);
    }
    let zeroes = Extent::zero(old, end - old);
    let extents = [zeroes];
    let mut windows = Windows::new(backing, &extents, false);
    while let Some(window) = windows.next(io, backing)? {
        plan.window(io, backing, window)?;
    }
    // What the overlay holds of it comes by once more.
    plan.grown = partial.then_some(last);
    Ok(Some(zeroes))
}

/// Whether a cluster has no L2 entry.
fn is_unallocated(io: &mut dyn BlockIo, backing: &mut Backing, cluster: GuestCluster) -> DriverResult<bool> {
    let Backing { image, mapping, .. } = backing;
    mapping.load(io, image, core::iter::once(cluster))?;
    Ok(mapping.l2_entry(image, cluster)?.entry == L2Entry::Unallocated)
}
