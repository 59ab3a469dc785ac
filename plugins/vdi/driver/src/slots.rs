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
use instar_guest_sdk::table;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};

/// The slots of an image that data goes into.
#[derive(Debug, Default)]
pub struct Slots {
    slots: table::Slots,
}

impl Slots {
    /// Those that the map leaves.
    pub fn new(survey: &Survey) -> Self {
        Self { slots: table::Slots::new(survey.top, survey.used) }
    }

    /// One more than the highest slot that is used or was given out.
    pub fn top(&self) -> u64 {
        self.slots.top()
    }

    /// [`Slots::top`] after so many more slots were given out.
    pub fn top_after(&self, more: u64) -> u64 {
        self.slots.top_after(more)
    }

    /// [`Slots::top`] after so many more slots were given out, none of them a gap, nor below `slot`.
    pub fn top_from(&self, slot: u64, more: u64) -> u64 {
        self.slots.top_from(slot, more)
    }

    /// Give out none below `slot` any more.
    pub fn skip_to(&mut self, slot: u64) {
        self.slots.skip_to(slot);
    }

    /// Give out the lowest slot that nothing uses.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`] if there are no more numbers; I/O errors.
    pub fn take(&mut self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<u32> {
        let gap = self.slots.take_gap(&mut |used| {
            each_entry(io, image, 0..image.header.blocks, &mut |_, entry| {
                if let Some(slot) = entry.slot() {
                    used.add(slot.into());
                }
                Ok(())
            })
        })?;
        match gap {
            Some(slot) => number(image, slot),
            None => self.append(image),
        }
    }

    /// Give out the slot behind all others.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`] if there are no more numbers.
    pub fn append(&mut self, image: &Image) -> DriverResult<u32> {
        number(image, self.slots.append()?)
    }
}

fn number(image: &Image, slot: u64) -> DriverResult<u32> {
    // The two highest numbers mean something else.
    u32::try_from(slot).ok().filter(|&slot| slot < u32::MAX - 1).ok_or_else(|| {
        let text = format!("slot {slot} is more than the map can name");
        DriverError::new(ErrorCode::NoSpace, text).at(image.device, 0)
    })
}
