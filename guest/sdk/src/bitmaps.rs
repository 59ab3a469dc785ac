//! Merging the bitmaps of the committed layers into those of the target (`docs/commit.md`, "Bitmaps").
//!
//! A bitmap records the changes since a checkpoint. It may claim more than has changed, never less: an incremental backup would
//! miss every change that it does not claim. So a bitmap is merged only if every layer has it, from the overlay down to the one
//! in which it begins.

use crate::bitmap::{check_dirty, Bitmap, DirtyRanges};
use crate::{BlockIo, DriverError, DriverResult, Sink, Source};
use alloc::vec::Vec;
use instar_guest_abi::{DirtyRange, ErrorCode, DEVICE_OUTPUT};

/// Number of ranges that are handed over at once.
const RANGES: usize = 4096;
/// Maximum number of bitmaps in one merge.
const MOST: usize = 8192;

/// The reason why a bitmap is not merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// A committed layer did not save it.
    Inconsistent,
    /// A committed layer has it disabled.
    Disabled,
    /// A layer lacks it, above one that has it.
    Interrupted,
    /// The target did not save it.
    TargetInconsistent,
    /// The target has it disabled.
    TargetDisabled,
}

/// The outcome for a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The target has it, and takes over the dirty ranges of the layers above.
    Merged,
    /// The target lacks it, and gets it.
    Made,
    /// It is left alone.
    Skipped(Skipped),
}

/// A bitmap of the committed layers, and its outcome.
#[derive(Clone, Debug)]
pub struct MergedBitmap {
    /// Its index in the source.
    index: u32,
    /// The bitmap as the target will have it.
    pub bitmap: Bitmap,
    /// Its outcome.
    pub fate: Fate,
}

/// Decide about each bitmap of the source, and plan what becomes of it; with `disabled`, those that are disabled are made as
/// well. Changes nothing.
pub(crate) fn plan(
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    disabled: bool,
) -> DriverResult<Vec<MergedBitmap>> {
    let mut own = source.bitmaps(io)?;
    if own.len() > MOST {
        let text = alloc::format!("there are {} bitmaps, and {MOST} can be merged at a time", own.len());
        return Err(DriverError::new(ErrorCode::ScratchTooSmall, text));
    }
    let theirs = if own.is_empty() { Vec::new() } else { sink.bitmaps(io)? };
    let mut merged = Vec::with_capacity(own.len());
    for (index, bitmap) in (0..).zip(own.drain(..)) {
        let fate = fate(&bitmap, theirs.iter().find(|other| other.name == bitmap.name), disabled);
        merged.push(MergedBitmap { index, bitmap, fate });
    }
    let limit = source.info().virtual_size.min(sink.info().virtual_size);
    each_range(io, source, &merged, limit, &mut |io, bitmap, ranges| {
        sink.plan_bitmap(io, bitmap, ranges).map_err(about_the_target)
    })?;
    Ok(merged)
}

/// Do what was planned.
pub(crate) fn merge(
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    planned: &[MergedBitmap],
) -> DriverResult<()> {
    let limit = source.info().virtual_size.min(sink.info().virtual_size);
    each_range(io, source, planned, limit, &mut |io, bitmap, ranges| {
        sink.merge_bitmap(io, bitmap, ranges).map_err(about_the_target)
    })
}

fn about_the_target(error: DriverError) -> DriverError {
    DriverError { device: error.device.or(Some(DEVICE_OUTPUT)), ..error }
}

/// What becomes of a bitmap, given the target's of that name, and whether `disabled` ones are made.
fn fate(own: &Bitmap, target: Option<&Bitmap>, disabled: bool) -> Fate {
    match target {
        _ if own.interrupted => Fate::Skipped(Skipped::Interrupted),
        _ if own.inconsistent => Fate::Skipped(Skipped::Inconsistent),
        Some(_) if !own.enabled => Fate::Skipped(Skipped::Disabled),
        None if !own.enabled && !disabled => Fate::Skipped(Skipped::Disabled),
        None => Fate::Made,
        Some(_) if own.ends => Fate::Skipped(Skipped::Interrupted),
        Some(target) if target.inconsistent => Fate::Skipped(Skipped::TargetInconsistent),
        Some(target) if !target.enabled => Fate::Skipped(Skipped::TargetDisabled),
        Some(_) => Fate::Merged,
    }
}

/// What is done with the ranges of a bitmap.
type EachRange<'a> = &'a mut dyn FnMut(&mut dyn BlockIo, &Bitmap, &[DirtyRange]) -> DriverResult<()>;

/// Hand what the bitmaps call dirty to `each`, in windows, up to guest byte `limit`; of an empty one, no range.
fn each_range(
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    merged: &[MergedBitmap],
    limit: u64,
    each: EachRange<'_>,
) -> DriverResult<()> {
    let size = source.info().virtual_size;
    let mut ranges = DirtyRanges::with_room_for(RANGES);
    for MergedBitmap { index, bitmap, fate } in merged {
        if matches!(fate, Fate::Skipped(_)) {
            continue;
        }
        each(io, bitmap, &[])?;
        let mut from = 0;
        while from < limit {
            ranges.clear();
            let next = source.dirty(io, *index, from, &mut ranges)?;
            check_dirty(&ranges, from, next, size).map_err(|why| DriverError::new(ErrorCode::GuestProtocol, why))?;
            let inside: Vec<DirtyRange> = ranges
                .iter()
                .map(|range| DirtyRange { start: range.start, end: range.end.min(limit) })
                .filter(|range| range.start < range.end)
                .collect();
            if !inside.is_empty() {
                each(io, bitmap, &inside)?;
            }
            from = next;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_of_a_bitmap() {
        use Skipped::{Disabled, Inconsistent, Interrupted, TargetDisabled, TargetInconsistent};
        let good = Bitmap::new(b"b".to_vec(), 65536, true, false);
        let disabled = Bitmap { enabled: false, ..good.clone() };
        let unsaved = Bitmap { inconsistent: true, ..good.clone() };
        let ends = Bitmap { ends: true, ..good.clone() };
        let interrupted = Bitmap { interrupted: true, ..good.clone() };
        for (own, target, expected) in [
            (&good, None, Fate::Made),
            (&good, Some(&good), Fate::Merged),
            (&ends, None, Fate::Made),
            (&ends, Some(&good), Fate::Skipped(Interrupted)),
            (&interrupted, None, Fate::Skipped(Interrupted)),
            (&disabled, None, Fate::Skipped(Disabled)),
            (&unsaved, Some(&good), Fate::Skipped(Inconsistent)),
            (&good, Some(&disabled), Fate::Skipped(TargetDisabled)),
            (&good, Some(&unsaved), Fate::Skipped(TargetInconsistent)),
        ] {
            assert_eq!(fate(own, target, false), expected, "{own:?} {target:?}");
        }
        assert_eq!(fate(&disabled, None, true), Fate::Made);
        assert_eq!(fate(&disabled, Some(&disabled), true), Fate::Skipped(Disabled));
        assert_eq!(fate(&Bitmap { inconsistent: true, ..disabled }, None, true), Fate::Skipped(Inconsistent));
    }
}
