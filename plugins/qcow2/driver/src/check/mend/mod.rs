//! Mending an image because somebody asked for it: what a check finds, as far as there is one right answer.
//!
//! Refcounts and COPIED flags say nothing that the tables do not say as well, so they follow from them, as long as every
//! table can be read. Where one cannot, nothing is mended: a cluster that only the damaged table names would count as free,
//! and somebody would write over it. (QEMU drops what it cannot read, `block/qcow2-refcount.c`.)
//!
//! A cluster that two entries of the active state name belongs to one of them; the other is damaged. It is shared from then on,
//! so that no write to the one part of the disk changes the other. What the damaged one named before counts as a leak, and is
//! the only copy of that part: in such an image no leak is given back.
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

mod passes;
mod plan;
mod rules;

pub(crate) use plan::Mend;

use crate::check::lost::{lost, Lost};
use crate::check::report::Finding;
use crate::image::Image;
use crate::metadata::map::MetadataMap;
use crate::metadata::slice_cache::SliceCache;
use crate::metadata::structures::Structures;
use crate::refcount::blocks::Refcounts;
use crate::refcount::space::Space;
use crate::references::calculated::CalculatedRefcounts;
use crate::references::cluster_set::ClusterSet;
use crate::references::walk::{check_copied_flags, compare_refcounts, each_pass, Comparison};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{FindingKind, Repair, RepairSummary};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, OrderedWriter};
use instar_qcow2_format::{incompatible, HostCluster, Version, INCOMPATIBLE_OFFSET};
use passes::{Flags, Setting, Survey, FLAGS_AT_ONCE};
use rules::Rules;

/// The marks in the header of an image that is not to be trusted.
const MARKS: u64 = incompatible::DIRTY | incompatible::CORRUPT;

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
        if plan.doubtful != 0 {
            let text = format!(
                "{} L2 entries name a cluster that another one names: nothing says which of the two is right, and both parts of \
                 the disk read the same",
                plan.doubtful
            );
            finding(FindingKind::Corruption, &text);
        }
        if plan.doubtful != 0 && plan.lowered != 0 {
            // Counted once more, by rules under which what no entry names is not given away.
            plan = Self::nothing(plan.rules.keeping());
            plan.survey(io, image, &mut |_, _| ())?;
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
                "{} clusters that no table refers to keep their refcounts: they may belong to {}",
                plan.kept,
                if plan.doubtful == 0 {
                    "a header extension that is unknown, or to bitmaps that are stale"
                } else {
                    "entries that name clusters of others now"
                }
            );
            finding(FindingKind::Leak, &text);
        }
        let marked = image.header.version == Version::V3 && image.header.incompatible & MARKS != 0;
        plan.clears_marks = marked && plan.left == 0;
        let corruptions = plan.raised + plan.wrong_flags + u64::from(plan.clears_marks);
        let summary = RepairSummary { corruptions, leaks: plan.lowered, final_length };
        Ok((plan, summary))
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
            // As many as there are counts of.
            let active = ClusterSet::new(HostCluster(counts.range().0), usize::MAX);
            let (refcounts, plan) = (&mut refcounts, &mut *self);
            let survey = &mut Survey { image, refcounts, counts, active, plan, finding: &mut *finding };
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
    let metadata = MetadataMap::build(io, image, Vec::new())?;
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
