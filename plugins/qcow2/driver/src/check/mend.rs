//! Mending an image because somebody asked for it: what a check finds, as far as there is one right answer.
//!
//! Refcounts and COPIED flags say nothing that the tables do not say as well, so they follow from them, as long as every
//! table can be read. Where one cannot, nothing is mended: a cluster that only the damaged table names would count as free,
//! and somebody would write over it. (QEMU drops what it cannot read, `block/qcow2-refcount.c`.)
//!
//! [`Mend::plan`] counts and changes nothing. [`Mend::apply`] walks again for each step, and writes as it goes, so that
//! memory does not depend on how much is wrong. The order, and the crash that each step survives; all of them leave an image
//! that reads as before, and that running it again finishes:
//!
//! 1. Autoclear bits that this program does not keep up go, *then a flush*: no change is durable while they claim to hold.
//! 2. Refcount blocks that are missing are [published](crate::refcount::publish), empty, behind the end of the file: no
//!    block says the same as refcounts of 0. A crash leaves leaks at most.
//! 3. Refcounts that are too low are raised, *then a flush*. Each of them is better raised, whichever are durable. From here
//!    on no cluster that is in use counts as free.
//! 4. COPIED flags follow the references, *then a flush*. Where a flag goes, the cluster has several, which are durable; where
//!    one is set, the cluster has a single one, although its refcount may still be too high.
//! 5. Refcounts that are too high are lowered to the number of references, *then a flush*: leaks go, and what would be leaks
//!    once the file is longer.
//! 6. The marks go (dirty, corrupt) if nothing is left that is wrong, *then a flush*. Until then the image has them.

use crate::check::lost::{lost, Lost};
use crate::check::report::Finding;
use crate::image::{overflow, Image};
use crate::metadata::map::MetadataMap;
use crate::metadata::slice_cache::SliceCache;
use crate::metadata::structures::Structures;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use crate::refcount::space::Space;
use crate::references::calculated::CalculatedRefcounts;
use crate::references::walk::{
    check_copied_flags, compare_refcounts, each_pass, BlockSlice, Comparison, FlagCheck, FlaggedEntry, Level,
};
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use instar_guest_sdk::abi::{ErrorCode, FindingKind, Repair, RepairSummary};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, OrderedWriter};
use instar_qcow2_format::{
    autoclear, get_refcount, incompatible, set_refcount, ExtensionKind, HostCluster, Version, COPIED,
    INCOMPATIBLE_OFFSET,
};

/// Refcount blocks that may be missing: their table entries are held until they are written.
const MAX_MISSING: usize = 1 << 16;
/// COPIED flags that are looked at at once: each may need slices of its own.
const FLAGS_AT_ONCE: usize = CLUSTERS_PER_LOAD / 16;
const MARKS: u64 = incompatible::DIRTY | incompatible::CORRUPT;

/// What refcounts and flags become.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// Refcounts that are too low are raised, and all flags corrected.
    all: bool,
    /// The largest refcount.
    max: u64,
    /// Clusters that no table names may belong to what this program does not know: they keep their refcount.
    keeps: bool,
}

impl Rules {
    fn of(image: &Image, what: Repair) -> Self {
        let stale = image.header.autoclear & autoclear::BITMAPS == 0;
        let owns = |kind: ExtensionKind| match kind {
            ExtensionKind::Unknown(_) => true,
            ExtensionKind::Bitmaps => stale,
            _ => false,
        };
        let keeps = image.header.extensions.iter().any(|extension| owns(extension.kind));
        Self { all: what == Repair::All, max: image.header.refcount_order.max(), keeps }
    }

    /// A refcount before those that are too high are lowered.
    fn raised(self, refcount: u64, references: u64) -> u64 {
        let can = self.all && references <= self.max;
        if can {
            refcount.max(references)
        } else {
            refcount
        }
    }

    /// A refcount in the end.
    fn ended(self, refcount: u64, references: u64) -> u64 {
        let raised = self.raised(refcount, references);
        if references == 0 && self.keeps {
            raised
        } else {
            raised.min(references)
        }
    }

    /// The COPIED flag of an entry: set exactly if the refcount of what it refers to is 1 in the end.
    fn copied(self, now: bool, refcount: u64, references: u64) -> bool {
        let follows = self.ended(refcount, references) == references && (self.all || refcount > references);
        if follows {
            references == 1
        } else {
            now
        }
    }
}

/// What is to be mended.
#[derive(Clone, Debug)]
pub(crate) struct Mend {
    rules: Rules,
    /// The refcount blocks to be made.
    missing: BTreeSet<u64>,
    /// Refcounts that are too low and will be raised, and too high and will be lowered.
    raised: u64,
    lowered: u64,
    /// Refcounts of clusters behind the end of the file that are not 0: no leaks yet, but as soon as the file grows.
    behind: u64,
    /// COPIED flags that contradict the refcount and will not, and all that change.
    wrong_flags: u64,
    flags: u64,
    /// Clusters that are kept although nothing that is known refers to them.
    kept: u64,
    /// Corruption that stays.
    left: u64,
    clears_marks: bool,
}

impl Mend {
    /// Find out what of `what` can be mended; what cannot goes to `finding`. Changes nothing.
    ///
    /// # Errors
    /// I/O errors, and what is no corruption.
    pub(crate) fn plan(
        io: &mut dyn BlockIo,
        image: &Image,
        what: Repair,
        finding: Finding<'_>,
    ) -> DriverResult<(Self, RepairSummary)> {
        let mut plan = Self::nothing(Rules::of(image, what));
        match plan.survey(io, image, finding) {
            Err(error) if error.code == image.corrupt_code() => {
                finding(FindingKind::Corruption, &unreadable(&error, lost(io, image)?));
                return Ok((Self::nothing(plan.rules), RepairSummary::default()));
            }
            surveyed => surveyed?,
        }
        let mut final_length = 0;
        if !plan.missing.is_empty() {
            let mut longer = image.clone();
            let fits = if image.fixed_length {
                Err("a block device has no end to put them at")
            } else {
                plan.make_blocks(io, &mut longer)?;
                let fits = longer.file_length <= image.max_length;
                fits.then_some(()).ok_or("the file would become longer than a repair may make it")
            };
            if let Err(why) = fits {
                let text = format!(
                    "{} refcount blocks are missing, and {why}: nothing was repaired. Make a copy with `qemu-img convert`",
                    plan.missing.len()
                );
                finding(FindingKind::Corruption, &text);
                return Ok((Self::nothing(plan.rules), RepairSummary::default()));
            }
            final_length = longer.file_length;
        }
        if plan.kept != 0 {
            let text = format!(
                "{} clusters that no table refers to keep their refcounts: they may belong to a header extension that is \
                 unknown, or to bitmaps that are stale",
                plan.kept
            );
            finding(FindingKind::Leak, &text);
        }
        let marked = image.header.version == Version::V3 && image.header.incompatible & MARKS != 0;
        plan.clears_marks = marked && plan.left == 0;
        let corruptions = plan.raised + plan.wrong_flags + u64::from(plan.clears_marks);
        Ok((plan.clone(), RepairSummary { corruptions, leaks: plan.lowered, final_length }))
    }

    fn nothing(rules: Rules) -> Self {
        Self {
            rules,
            missing: BTreeSet::new(),
            raised: 0,
            lowered: 0,
            behind: 0,
            wrong_flags: 0,
            flags: 0,
            kept: 0,
            left: 0,
            clears_marks: false,
        }
    }

    /// Count everything.
    fn survey(&mut self, io: &mut dyn BlockIo, image: &Image, finding: Finding<'_>) -> DriverResult<()> {
        let mut structures = Structures::new(image);
        for (index, snapshot) in structures.snapshots(io)?.entries.iter().enumerate() {
            if image.header.version == Version::V3 && snapshot.virtual_size.is_none() {
                self.left += 1;
                let text = format!(
                    "the entry of snapshot {} does not record its virtual size, and nothing else says which it had",
                    index + 1
                );
                finding(FindingKind::Corruption, &text);
            }
        }
        let mut refcounts = Refcounts::new(image);
        each_count(io, image, &mut |io, counts| {
            let survey =
                &mut Survey { image, refcounts: &mut refcounts, counts, plan: &mut *self, finding: &mut *finding };
            compare_refcounts(io, image, counts, u64::MAX, survey)?;
            check_copied_flags(io, image, FLAGS_AT_ONCE, survey)
        })
    }

    /// Mend what was planned: the steps at the top of this module. Durable when it returns.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn apply(&self, io: &mut dyn BlockIo, image: &mut Image) -> DriverResult<()> {
        // Step 1.
        image.clear_autoclear(io)?;
        // Step 2.
        if !self.missing.is_empty() {
            let mut space = self.make_blocks(io, image)?;
            let mut out = OrderedWriter::new(image.device);
            out.set_length(io, image.file_length)?;
            // A table that was replaced is a leak from now on, and goes with the others.
            space.publish(io, image, &mut out)?;
        }
        // Step 3.
        if self.raised != 0 {
            let rules = self.rules;
            self.set_refcounts(io, image, &move |refcount, references| rules.raised(refcount, references))?;
        }
        // Step 4.
        if self.flags != 0 {
            let image = &*image;
            each_count(io, image, &mut |io, counts| {
                let (mut refcounts, mut tables) =
                    (Refcounts::new(image), SliceCache::new(image.device, image.slice_size()));
                let flags =
                    &mut Flags { image, rules: self.rules, counts, refcounts: &mut refcounts, tables: &mut tables };
                check_copied_flags(io, image, FLAGS_AT_ONCE, flags)
            })?;
            io.flush(image.device)?;
        }
        // Step 5. A table that was replaced in step 2 was no leak before.
        if self.lowered + self.behind != 0 || !self.missing.is_empty() {
            let rules = self.rules;
            self.set_refcounts(io, image, &move |refcount, references| rules.ended(refcount, references))?;
        }
        // Step 6.
        if self.clears_marks {
            image.header.incompatible &= !MARKS;
            io.write(image.device, INCOMPATIBLE_OFFSET, &image.header.incompatible.to_be_bytes())?;
            io.flush(image.device)?;
        }
        Ok(())
    }

    /// Make the refcount blocks that are missing, in memory. Clusters for them come from behind the end of the file, where
    /// nothing is, whatever the refcounts say.
    fn make_blocks(&self, io: &mut dyn BlockIo, image: &mut Image) -> DriverResult<Space> {
        let mut space = Space::new(image);
        // The last one first: a table that has to grow does so once.
        for &index in self.missing.iter().rev() {
            space.allocator.describe(io, image, &mut space.refcounts, index)?;
        }
        Ok(space)
    }

    /// Give every cluster the refcount that `becomes` makes of its refcount and its number of references. Durable when it
    /// returns.
    fn set_refcounts(
        &self,
        io: &mut dyn BlockIo,
        image: &Image,
        becomes: &dyn Fn(u64, u64) -> u64,
    ) -> DriverResult<()> {
        let mut refcounts = Refcounts::new(image);
        each_count(io, image, &mut |io, counts| {
            let setting = &mut Setting { refcounts: &mut refcounts, becomes };
            compare_refcounts(io, image, counts, u64::MAX, setting)?;
            setting.bound(io)
        })?;
        io.flush(image.device)
    }
}

/// Call `each` with all references, pass by pass, as the tables say them now.
fn each_count(
    io: &mut dyn BlockIo,
    image: &Image,
    each: &mut dyn FnMut(&mut dyn BlockIo, &CalculatedRefcounts) -> DriverResult<()>,
) -> DriverResult<()> {
    let metadata = MetadataMap::build(io, image, alloc::vec::Vec::new())?;
    each_pass(io, &mut Structures::new(image), &metadata, each)
}

/// Why nothing is mended.
fn unreadable(error: &DriverError, lost: Lost) -> String {
    let at = error.offset.map_or_else(String::new, |offset| format!(" (offset {offset})"));
    format!(
        "{}{at}: this cannot be repaired without losing what it leads to ({}). Nothing else was repaired either, because \
         clusters that only it refers to would be given away",
        error.text,
        lost.clause()
    )
}

/// Counts what is wrong in one pass.
struct Survey<'a> {
    image: &'a Image,
    refcounts: &'a mut Refcounts,
    counts: &'a CalculatedRefcounts,
    plan: &'a mut Mend,
    finding: Finding<'a>,
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
        let order = self.refcounts.order();
        let bytes = self.refcounts.blocks.bytes(slice.at)?.to_vec();
        for cluster in slice.clusters.clone() {
            let position = usize::try_from(cluster - slice.first).map_err(|_| overflow("the index of a refcount"))?;
            let refcount = get_refcount(&bytes, order, position).unwrap_or(0);
            self.one(HostCluster(cluster), refcount, counts.get(HostCluster(cluster)).unwrap_or(0));
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
    fn wants(&mut self, entry: &FlaggedEntry) -> bool {
        self.counts.covers(entry.cluster)
    }

    fn batch(&mut self, io: &mut dyn BlockIo, _level: Level, entries: &[FlaggedEntry]) -> DriverResult<()> {
        load_refcounts(self.refcounts, io, self.image, entries)?;
        for entry in entries {
            let refcount = self.refcounts.get(self.image, entry.cluster)?;
            let references = self.counts.get(entry.cluster).unwrap_or(0);
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

/// Load the refcounts of what these entries refer to, and little else.
fn load_refcounts(
    refcounts: &mut Refcounts,
    io: &mut dyn BlockIo,
    image: &Image,
    entries: &[FlaggedEntry],
) -> DriverResult<()> {
    refcounts.table.shrink(CLUSTERS_PER_LOAD);
    refcounts.blocks.shrink(FLAGS_AT_ONCE);
    refcounts.load(io, image, entries.iter().map(|entry| entry.cluster))
}

/// Sets refcounts in one pass.
struct Setting<'a> {
    refcounts: &'a mut Refcounts,
    becomes: &'a dyn Fn(u64, u64) -> u64,
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
struct Flags<'a> {
    image: &'a Image,
    rules: Rules,
    counts: &'a CalculatedRefcounts,
    refcounts: &'a mut Refcounts,
    tables: &'a mut SliceCache,
}

impl FlagCheck for Flags<'_> {
    fn wants(&mut self, entry: &FlaggedEntry) -> bool {
        self.counts.covers(entry.cluster)
    }

    fn batch(&mut self, io: &mut dyn BlockIo, _level: Level, entries: &[FlaggedEntry]) -> DriverResult<()> {
        load_refcounts(self.refcounts, io, self.image, entries)?;
        let mut changed = alloc::vec::Vec::new();
        for entry in entries {
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
