//! Mending an image because somebody asked for it: the field `in_use` of one that was not closed and is right otherwise.
//!
//! One write within the first sector, *then a flush*: a crash leaves the image open or closed.

use crate::check::check;
use crate::image::Image;
use crate::mark::Mark;
use alloc::format;
use instar_guest_sdk::abi::{FindingKind, Repair, RepairSummary};
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};

/// Find out whether the mark may go.
///
/// # Errors
/// I/O errors.
pub fn plan(
    io: &mut dyn BlockIo,
    image: &Image,
    repair: Repair,
    finding: &mut dyn FnMut(FindingKind, &str),
) -> DriverResult<RepairSummary> {
    let found = check(io, image, false, &mut |kind, text| {
        finding(kind, &format!("{text}: nothing says where its data is, and it would be lost"));
    })?;
    if Mark::left(image).is_none() || found.corruptions != 0 || repair == Repair::Leaks {
        return Ok(RepairSummary::default());
    }
    if image.header.ext_off != 0 {
        finding(
            FindingKind::Corruption,
            "the image stays open: its dirty bitmaps may be wrong since then, and would be believed once it is closed",
        );
        return Ok(RepairSummary::default());
    }
    Ok(RepairSummary { corruptions: 1, leaks: 0, final_length: 0 })
}

/// Close the image. Durable when it returns.
///
/// # Errors
/// I/O errors.
pub fn apply(io: &mut dyn BlockIo, image: &mut Image) -> DriverResult<()> {
    let mut out = OrderedWriter::new(image.device);
    match Mark::left(image) {
        Some(mark) => mark.close(io, image, &mut out),
        None => Ok(()),
    }
}
