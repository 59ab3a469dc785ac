//! Repairing an image that was not closed cleanly: refcounts and COPIED flags.
//!
//! The dirty bit ("Header", `incompatible_features` bit 0) says that refcounts may be wrong in either direction
//! (`lazy_refcounts`), and with them the COPIED flags. Everything else about the image is checked as ever.
//!
//! [`Repair::plan`] counts all references and holds what differs in memory, in changed slices of the tables; nothing is
//! written, and who plans on with these slices sees the image as it will be. [`Repair::apply`] writes it, before every
//! other change. The dirty bit stays until the end, so a crash at any step leaves an image that reads as before and
//! whose next commit counts again:
//!
//! 1. Refcounts, and the refcount blocks that were missing (they stand past the old end of the file), are
//!    [published](crate::refcount::publish): *durable*. The bit says that refcounts may be wrong, whichever of them are
//!    durable first.
//! 2. COPIED flags of L1 and L2 entries; the old refcount table is released, *then a flush*.
//! 3. The dirty bit is cleared, *then a flush*. Refcounts and flags are right, durably.

use crate::image::{overflow, Image};
use crate::metadata::map::MetadataMap;
use crate::metadata::mapping::Mapping;
use crate::metadata::structures::Structures;
use crate::refcount::blocks::Refcounts;
use crate::refcount::space::Space;
use crate::references::calculated::CalculatedRefcounts;
use crate::references::walk::{
    check_copied_flags, compare_refcounts, each_pass, BlockSlice, Comparison, FlagCheck, FlaggedEntry, Level,
};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, OrderedWriter};
use instar_qcow2_format::{incompatible, set_refcount, ExtensionKind, HostCluster, COPIED, INCOMPATIBLE_OFFSET};

/// Memory for the slices that will be written, in bytes. QEMU holds back no more than its refcount cache, which is smaller
/// by default.
const SLICE_BUDGET: usize = 6 << 20;
/// Memory that a slice takes besides its bytes.
const SLICE_COST: usize = 96;
/// Clusters with references whose refcount block is missing: at most this many.
const MAX_UNDESCRIBED: usize = 1 << 18;
/// COPIED flags that are changed between two walks over the entries.
const FLAGS: usize = 1 << 14;
/// COPIED flags that are changed at once: each may need a slice of its own.
const FLAGS_AT_ONCE: usize = 256;

/// A repaired image, of which the device knows nothing yet.
pub struct Repair {
    /// The image, as long as it will be.
    pub image: Image,
    /// Its refcounts, and where new clusters come from; what will be written is held.
    pub space: Space,
    /// Its mapping; slices with changed COPIED flags are held.
    pub mapping: Mapping,
    /// Slices that may be held, at most.
    most: usize,
    pub(crate) outstanding: Outstanding,
}

/// What it takes to write a planned repair, besides the changed slices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outstanding {
    /// Length of the file in bytes before the repair.
    length: u64,
}

impl Repair {
    /// Count all references of an image, and work out what must be written. Changes nothing. The structure of the image
    /// was checked; `metadata` is where its tables are.
    ///
    /// # Errors
    /// Corruption that the check does not see; [`ErrorCode::RefcountExhausted`] for references that the refcounts cannot
    /// count; [`ErrorCode::ScratchTooSmall`] if too much is wrong; I/O errors.
    pub fn plan(io: &mut dyn BlockIo, image: &Image, metadata: &MetadataMap) -> DriverResult<Self> {
        let mut structures = Structures::new(image);
        let size = image.slice_size();
        let mut repair = Self {
            image: image.clone(),
            space: Space::new(image),
            mapping: Mapping::new(image),
            most: SLICE_BUDGET.min(io.heap_free() / 4) / (size + SLICE_COST),
            outstanding: Outstanding { length: image.file_length },
        };
        let mut undescribed = Vec::new();
        each_pass(io, &mut structures, metadata, &mut |io, counts| {
            let mut correction = Correction { image, repair: &mut repair, counts, undescribed: &mut undescribed };
            compare_refcounts(io, image, counts, u64::MAX, &mut correction)?;
            correction.repair.bound()?;
            check_copied_flags(io, image, FLAGS, &mut correction)
        })?;
        // On a device, a new block could only stand in the midst of what no block describes.
        let stuck = image.fixed_length && !undescribed.is_empty();
        if !stuck {
            repair.describe(io, &undescribed)?;
        }
        if stuck || repair.image.file_length > repair.image.max_length {
            let text = "refcount blocks are missing: run `qemu-img check -r all` on it first";
            return Err(repair.image.corrupt(image.header.refcount_table.0, text));
        }
        Ok(repair)
    }

    /// Make the refcount blocks that are missing. All others are right by now, so that new clusters are really free.
    fn describe(&mut self, io: &mut dyn BlockIo, undescribed: &[(HostCluster, u64)]) -> DriverResult<()> {
        for &(cluster, count) in undescribed {
            let (image, Space { refcounts, allocator, .. }) = (&mut self.image, &mut self.space);
            let (index, _) = refcounts.locate(cluster);
            allocator.describe(io, image, refcounts, index)?;
            refcounts.load(io, image, core::iter::once(cluster))?;
            if count > refcounts.order().max() {
                return Err(too_many(image, cluster, count));
            }
            refcounts.set(image, cluster, count)?;
            self.bound()?;
        }
        Ok(())
    }

    /// Forget what is right. What is wrong has to fit into memory until it is written.
    fn bound(&mut self) -> DriverResult<()> {
        let most = self.most;
        let refcounts = &mut self.space.refcounts;
        let kinds = [&mut refcounts.table, &mut refcounts.blocks, &mut self.mapping.l1, &mut self.mapping.l2];
        if kinds.iter().map(|slices| slices.held()).sum::<usize>() <= most {
            return Ok(());
        }
        let mut held = 0;
        for slices in kinds {
            slices.shrink(0);
            held += slices.held();
        }
        // Room for the slices of a block at least, before all is looked at again.
        if held > most - most / 4 {
            return Err(too_much(&self.image));
        }
        Ok(())
    }

    /// Write the repair: the steps at the top of this module. Durable when it returns.
    ///
    /// # Errors
    /// I/O errors.
    pub fn apply(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.outstanding.apply(io, &mut self.image, &mut self.space, &mut self.mapping)
    }
}

/// Lets refcounts and flags say what was counted in one pass.
struct Correction<'a> {
    image: &'a Image,
    repair: &'a mut Repair,
    counts: &'a CalculatedRefcounts,
    /// Clusters with references that no refcount block describes, with their count.
    undescribed: &'a mut Vec<(HostCluster, u64)>,
}

impl Comparison for Correction<'_> {
    fn refcounts(&mut self) -> &mut Refcounts {
        &mut self.repair.space.refcounts
    }

    fn slice(&mut self, slice: &BlockSlice, counts: &CalculatedRefcounts) -> DriverResult<()> {
        // Clusters may belong to a header extension that nobody here knows.
        let keep = self.image.header.extensions.iter().any(|e| matches!(e.kind, ExtensionKind::Unknown(_)));
        let refcounts = &mut self.repair.space.refcounts;
        let mut bytes = refcounts.blocks.bytes(slice.at)?.to_vec();
        for cluster in slice.clusters.clone().map(HostCluster) {
            let count = counts.get(cluster).unwrap_or(0);
            if count != 0 || !keep {
                let index = usize::try_from(cluster.0 - slice.first).map_err(|_| overflow("a refcount"))?;
                set_refcount(&mut bytes, refcounts.order(), index, count)
                    .ok_or_else(|| too_many(self.image, cluster, count))?;
            }
        }
        refcounts.blocks.replace(slice.at, &bytes)
    }

    fn undescribed(&mut self, cluster: HostCluster, references: u64) -> DriverResult<()> {
        if self.undescribed.len() >= MAX_UNDESCRIBED {
            return Err(too_much(self.image));
        }
        self.undescribed.push((cluster, references));
        Ok(())
    }

    fn bound(&mut self, _io: &mut dyn BlockIo) -> DriverResult<()> {
        self.repair.bound()
    }
}

impl FlagCheck for Correction<'_> {
    /// COPIED says that the refcount is 1. What another pass counts is of no concern here.
    fn wants(&mut self, entry: &FlaggedEntry) -> bool {
        if entry.outside {
            // Once.
            return !entry.copied && self.counts.range().0 == 0;
        }
        self.counts.get(entry.cluster).is_some_and(|count| entry.copied != (count == 1))
    }

    fn batch(&mut self, io: &mut dyn BlockIo, level: Level, entries: &[FlaggedEntry]) -> DriverResult<()> {
        for batch in entries.chunks(FLAGS_AT_ONCE) {
            let mapping = &mut self.repair.mapping;
            let tables = if level == Level::L1 { &mut mapping.l1 } else { &mut mapping.l2 };
            tables.load(io, batch.iter().map(|entry| entry.at))?;
            for entry in batch {
                let raw = tables.entry(entry.at)?;
                tables.set_entry(entry.at, if entry.copied { raw & !COPIED } else { raw | COPIED })?;
            }
            self.repair.bound()?;
        }
        Ok(())
    }
}

impl Outstanding {
    /// As [`Repair::apply`], of an image whose tables have gone elsewhere meanwhile.
    pub(crate) fn apply(
        self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        space: &mut Space,
        mapping: &mut Mapping,
    ) -> DriverResult<()> {
        let device = image.device;
        let mut out = OrderedWriter::new(device);
        // Step 1.
        if image.file_length != self.length {
            out.set_length(io, image.file_length)?;
        }
        // The flush of step 1 is due whether or not a refcount changes.
        out.written();
        let replaced = space.publish(io, image, &mut out)?;
        // Step 2.
        mapping.l1.write_dirty(io)?;
        mapping.l2.write_dirty(io)?;
        space.refcounts.release(io, image, replaced)?;
        io.flush(device)?;
        // Step 3.
        image.header.incompatible &= !incompatible::DIRTY;
        io.write(device, INCOMPATIBLE_OFFSET, &image.header.incompatible.to_be_bytes())?;
        io.flush(device)
    }
}

fn too_much(image: &Image) -> DriverError {
    let text =
        "the image was not closed cleanly, and too many refcounts are wrong: run `instar check -r all` on it first";
    DriverError::new(ErrorCode::ScratchTooSmall, text).at(image.device, image.header.refcount_table.0)
}

fn too_many(image: &Image, cluster: HostCluster, count: u64) -> DriverError {
    let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
    let bits = image.header.refcount_order.bits();
    let text = format!("the cluster at offset {offset} has {count} references, too many for refcounts of {bits} bits");
    DriverError::new(ErrorCode::RefcountExhausted, text).at(image.device, offset.0)
}
