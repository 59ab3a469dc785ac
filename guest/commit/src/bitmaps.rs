//! What the host is told of a bitmap.

use instar_guest_protocol::commit::{bitmap, Bitmap};
use instar_guest_sdk::{Fate, MergedBitmap, Skipped};

/// The message about a bitmap.
pub fn told(merged: &MergedBitmap) -> Bitmap {
    let fate = match merged.fate {
        Fate::Merged => bitmap::Fate::Merged,
        Fate::Made => bitmap::Fate::Made,
        Fate::Skipped(Skipped::Inconsistent) => bitmap::Fate::Inconsistent,
        Fate::Skipped(Skipped::Disabled) => bitmap::Fate::Disabled,
        Fate::Skipped(Skipped::Interrupted) => bitmap::Fate::Interrupted,
        Fate::Skipped(Skipped::TargetInconsistent) => bitmap::Fate::TargetInconsistent,
        Fate::Skipped(Skipped::TargetDisabled) => bitmap::Fate::TargetDisabled,
    };
    let (name, granularity) = (merged.bitmap.name.clone(), merged.bitmap.granularity);
    Bitmap { name, granularity, fate: fate.into() }
}
