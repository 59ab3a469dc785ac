//! Where new blocks go: into slots that nothing uses, from the lowest on.
//!
//! Every writer of VDIs, this one excepted, puts the next block into slot `cBlocksAllocated` without a look at the map. So
//! that number has to be higher than every slot that is used. Slots below it that nothing uses are lost space; they are
//! filled first, so that an image that a crash left with such gaps has none any more when the commit was run again.

use crate::image::Image;
use crate::map::each_entry;
use crate::survey::Survey;
use alloc::format;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::table::Slots;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};

/// The slots that the map leaves.
pub fn left_by(survey: &Survey) -> Slots {
    Slots::new(survey.top, survey.used)
}

/// Give out the lowest slot that nothing uses.
///
/// # Errors
/// [`ErrorCode::NoSpace`] if there are no more numbers; I/O errors.
pub fn take(slots: &mut Slots, io: &mut dyn BlockIo, image: &Image) -> DriverResult<u32> {
    let gap = slots.take_gap(&mut |used| {
        each_entry(io, image, 0..image.header.blocks, &mut |_, entry| {
            if let Some(slot) = entry.slot() {
                used.add(slot.into());
            }
            Ok(())
        })
    })?;
    match gap {
        Some(slot) => number(image, slot),
        None => append(slots, image),
    }
}

/// Give out the slot behind all others.
///
/// # Errors
/// [`ErrorCode::NoSpace`] if there are no more numbers.
pub fn append(slots: &mut Slots, image: &Image) -> DriverResult<u32> {
    number(image, slots.append()?)
}

fn number(image: &Image, slot: u64) -> DriverResult<u32> {
    // The two highest numbers mean something else.
    u32::try_from(slot).ok().filter(|&slot| slot < u32::MAX - 1).ok_or_else(|| {
        let text = format!("slot {slot} is more than the map can name");
        DriverError::new(ErrorCode::NoSpace, text).at(image.device, 0)
    })
}
