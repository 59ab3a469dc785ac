//! Mending an image because somebody asked for it: `cBlocksAllocated`, which says what the map says as well.
//!
//! The number is one write within a sector, *then a flush*: a crash leaves the one or the other. It becomes the highest slot
//! that is used and one, whether it was lower (another program would write the next block over one that is there) or higher
//! (slots behind all blocks are lost). Slots between blocks stay lost: what gives them back moves blocks.

use crate::image::Image;
use crate::survey::survey;
use alloc::format;
use instar_guest_sdk::abi::{FindingKind, Repair, RepairSummary};
use instar_guest_sdk::table::tell_findings;
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};

/// Find out which number of slots is right, and what that mends. `None` leaves the one that is there.
///
/// # Errors
/// I/O errors.
pub fn plan(
    io: &mut dyn BlockIo,
    image: &Image,
    repair: Repair,
    finding: &mut dyn FnMut(FindingKind, &str),
) -> DriverResult<(Option<u32>, RepairSummary)> {
    let rest = "the map is damaged throughout";
    let lost = &mut |kind, text: &str| {
        finding(kind, &format!("{text}: nothing says where its data is, and another entry would lose it"));
    };
    let (found, wrong) = tell_findings(lost, rest, |wrong| survey(io, image, wrong))?;
    let Some(found) = found.filter(|_| wrong == 0) else { return Ok(Default::default()) };
    if found.beyond > 0 {
        let text = format!("{} entries for blocks past the end of the disk stay: they would be lost", found.beyond);
        finding(FindingKind::Leak, &text);
    }
    let (allocated, blocks) = (u64::from(image.header.allocated), u64::from(image.header.blocks));
    let right = u32::try_from(found.top).ok().filter(|_| found.top <= blocks);
    let Some(right) = right else {
        let text = format!(
            "slot {} is used, and cBlocksAllocated may be {blocks} at most: make a copy with `qemu-img convert`",
            found.top.saturating_sub(1)
        );
        finding(FindingKind::Corruption, &text);
        return Ok(Default::default());
    };
    let corruptions = u64::from(allocated < found.top) + u64::from(allocated > blocks);
    let leaks = allocated.saturating_sub(found.top);
    if (corruptions, leaks) == (0, 0) || (repair == Repair::Leaks && leaks == 0) {
        return Ok(Default::default());
    }
    Ok((Some(right), RepairSummary { corruptions, leaks, final_length: 0 }))
}

/// Write the number. Durable when it returns.
///
/// # Errors
/// I/O errors.
pub fn apply(io: &mut dyn BlockIo, image: &mut Image, allocated: u32) -> DriverResult<()> {
    let mut out = OrderedWriter::new(image.device);
    image.header.allocated = allocated;
    image.write_header(io, &mut out)?;
    out.barrier(io)
}
