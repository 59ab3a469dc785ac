//! The passes of a repair over all references: one counts what is wrong, the others write.

use super::plan::Mend;
use super::rules::Rules;
use crate::check::report::Finding;
use crate::image::{overflow, Image};
use crate::metadata::l2_entry::Mapped;
use crate::metadata::slice_cache::SliceCache;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use crate::references::calculated::CalculatedRefcounts;
use crate::references::cluster_set::ClusterSet;
use crate::references::walk::{BlockSlice, Comparison, FlagCheck, FlaggedEntry, Level};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, FindingKind};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{get_refcount, set_refcount, HostCluster, COPIED};

/// Refcount blocks that may be missing: their table entries are held until they are written.
const MAX_MISSING: usize = 1 << 16;
/// COPIED flags that are looked at at once: each may need slices of its own.
pub(super) const FLAGS_AT_ONCE: usize = CLUSTERS_PER_LOAD / 16;

/// Counts what is wrong in one pass.
pub(super) struct Survey<'a> {
    pub(super) image: &'a Image,
    pub(super) refcounts: &'a mut Refcounts,
    pub(super) counts: &'a CalculatedRefcounts,
    /// What entries of the active state name, of the clusters of this pass.
    pub(super) active: ClusterSet,
    pub(super) plan: &'a mut Mend,
    pub(super) finding: Finding<'a>,
}

impl Survey<'_> {
    fn one(&mut self, cluster: HostCluster, refcount: u64, references: u64) {
        let (rules, plan) = (self.plan.rules, &mut *self.plan);
        let (raised, ended) = (rules.raised(refcount, references), rules.ended(refcount, references));
        let in_file = cluster.0 < self.image.cluster_size().count_for(self.image.file_length);
        plan.raised += u64::from(raised > refcount);
        *(if in_file { &mut plan.lowered } else { &mut plan.behind }) += u64::from(ended < refcount);
        plan.left += u64::from(ended < references);
        plan.kept += u64::from(in_file && ended > references);
        if rules.all && ended < references {
            let text = format!(
                "cluster {} has {references} references, too many for refcounts of {} bits: one that is dropped takes the \
                 data from the others. Make a copy with `qemu-img convert`",
                cluster.0,
                self.image.header.refcount_order.bits()
            );
            (self.finding)(FindingKind::Corruption, &text);
        }
    }
}

impl Comparison for Survey<'_> {
    fn refcounts(&mut self) -> &mut Refcounts {
        self.refcounts
    }

    fn slice(&mut self, slice: &BlockSlice, counts: &CalculatedRefcounts) -> DriverResult<()> {
        for (cluster, refcount) in slice.refcounts(self.refcounts)? {
            self.one(cluster, refcount, counts.get(cluster).unwrap_or(0));
        }
        Ok(())
    }

    fn undescribed(&mut self, cluster: HostCluster, references: u64) -> DriverResult<()> {
        self.one(cluster, 0, references);
        if self.plan.rules.all && self.plan.missing.insert(self.refcounts.locate(cluster).0) {
            let many = self.plan.missing.len() > MAX_MISSING;
            let text = "more refcount blocks are missing than a repair can hold: make a copy with `qemu-img convert`";
            let error = || DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.image.device, 48);
            return if many { Err(error()) } else { Ok(()) };
        }
        Ok(())
    }

    fn bound(&mut self, _io: &mut dyn BlockIo) -> DriverResult<()> {
        self.refcounts.table.shrink(CLUSTERS_PER_LOAD);
        self.refcounts.blocks.shrink(0);
        Ok(())
    }
}

impl FlagCheck for Survey<'_> {
    /// Data that a cut file lacks is nowhere else.
    fn mapped(&mut self, mapped: &Mapped) {
        let in_pass = |offset| self.counts.covers(self.image.host_cluster(offset));
        if !mapped.entry.host().is_some_and(|(offset, _)| in_pass(offset)) {
            return;
        }
        if let Some(text) = mapped.cut_off(self.image) {
            self.plan.left += 1;
            (self.finding)(FindingKind::Corruption, &format!("{text}: no repair brings that back"));
        }
    }

    fn wants(&mut self, entry: &FlaggedEntry) -> bool {
        wants(self.counts, entry)
    }

    fn batch(&mut self, io: &mut dyn BlockIo, level: Level, entries: &[FlaggedEntry]) -> DriverResult<()> {
        load_refcounts(self.refcounts, io, self.image, entries)?;
        for entry in entries {
            if entry.outside {
                let mends = self.plan.rules.all;
                *(if mends { &mut self.plan.wrong_flags } else { &mut self.plan.left }) += 1;
                self.plan.flags += u64::from(mends);
                continue;
            }
            let refcount = self.refcounts.get(self.image, entry.cluster)?;
            let references = self.counts.get(entry.cluster).unwrap_or(0);
            let twice = level == Level::L2 && !self.active.insert(entry.cluster);
            self.plan.doubtful += u64::from(twice);
            self.plan.left += u64::from(twice);
            let rules = self.plan.rules;
            let copied = rules.copied(entry.copied, refcount, references);
            let (was_wrong, is_wrong) =
                (entry.copied != (refcount == 1), copied != (rules.ended(refcount, references) == 1));
            self.plan.wrong_flags += u64::from(was_wrong && !is_wrong);
            self.plan.left += u64::from(is_wrong);
            self.plan.flags += u64::from(copied != entry.copied);
        }
        Ok(())
    }
}

/// Whether an entry is looked at in the pass with these counts. What no refcount counts is wrong without its flag, and has
/// its turn in the first one.
fn wants(counts: &CalculatedRefcounts, entry: &FlaggedEntry) -> bool {
    if entry.outside {
        return !entry.copied && counts.range().0 == 0;
    }
    counts.covers(entry.cluster)
}

/// Load the refcounts of what these entries refer to, and little else.
fn load_refcounts(
    refcounts: &mut Refcounts,
    io: &mut dyn BlockIo,
    image: &Image,
    entries: &[FlaggedEntry],
) -> DriverResult<()> {
    refcounts.table.shrink(CLUSTERS_PER_LOAD);
    refcounts.blocks.shrink(FLAGS_AT_ONCE);
    let counted = entries.iter().filter(|entry| !entry.outside);
    refcounts.load(io, image, counted.map(|entry| entry.cluster))
}

/// Sets refcounts in one pass.
pub(super) struct Setting<'a> {
    pub(super) refcounts: &'a mut Refcounts,
    pub(super) becomes: &'a dyn Fn(u64, u64) -> u64,
}

impl Comparison for Setting<'_> {
    fn refcounts(&mut self) -> &mut Refcounts {
        self.refcounts
    }

    fn slice(&mut self, slice: &BlockSlice, counts: &CalculatedRefcounts) -> DriverResult<()> {
        let order = self.refcounts.order();
        let mut bytes = self.refcounts.blocks.bytes(slice.at)?.to_vec();
        for cluster in slice.clusters.clone() {
            let position = usize::try_from(cluster - slice.first).map_err(|_| overflow("the index of a refcount"))?;
            let refcount = get_refcount(&bytes, order, position).unwrap_or(0);
            let becomes = (self.becomes)(refcount, counts.get(HostCluster(cluster)).unwrap_or(0));
            set_refcount(&mut bytes, order, position, becomes).ok_or_else(|| overflow("a refcount"))?;
        }
        self.refcounts.blocks.replace(slice.at, &bytes)
    }

    /// A cluster that no block describes keeps the refcount 0.
    fn undescribed(&mut self, _cluster: HostCluster, _references: u64) -> DriverResult<()> {
        Ok(())
    }

    /// In which order refcounts of one step become durable does not matter.
    fn bound(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.refcounts.blocks.write_dirty(io)?;
        self.refcounts.table.shrink(CLUSTERS_PER_LOAD);
        self.refcounts.blocks.shrink(0);
        Ok(())
    }
}

/// Sets COPIED flags in one pass.
pub(super) struct Flags<'a> {
    pub(super) image: &'a Image,
    pub(super) rules: Rules,
    pub(super) counts: &'a CalculatedRefcounts,
    pub(super) refcounts: &'a mut Refcounts,
    pub(super) tables: &'a mut SliceCache,
}

impl FlagCheck for Flags<'_> {
    fn wants(&mut self, entry: &FlaggedEntry) -> bool {
        wants(self.counts, entry)
    }

    fn batch(&mut self, io: &mut dyn BlockIo, _level: Level, entries: &[FlaggedEntry]) -> DriverResult<()> {
        load_refcounts(self.refcounts, io, self.image, entries)?;
        let mut changed = Vec::new();
        for entry in entries {
            if entry.outside {
                changed.extend(Some(*entry).filter(|_| self.rules.all));
                continue;
            }
            let refcount = self.refcounts.get(self.image, entry.cluster)?;
            let references = self.counts.get(entry.cluster).unwrap_or(0);
            if self.rules.copied(entry.copied, refcount, references) != entry.copied {
                changed.push(*entry);
            }
        }
        self.tables.load(io, changed.iter().map(|entry| entry.at))?;
        for entry in changed {
            let raw = self.tables.entry(entry.at)?;
            self.tables.set_entry(entry.at, if entry.copied { raw & !COPIED } else { raw | COPIED })?;
        }
        self.tables.write_dirty(io)?;
        self.tables.clear();
        Ok(())
    }
}
