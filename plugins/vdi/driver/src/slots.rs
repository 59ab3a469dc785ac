//! Where new blocks go: into slots that nothing uses, from the lowest on.
//!
//! Every writer of VDIs, this one excepted, puts the next block into slot `cBlocksAllocated` without a look at the map. So
//! that number has to be higher than every slot that is used. Slots below it that nothing uses are lost space; they are
//! filled first, so that an image that a crash left with such gaps has none any more when the commit was run again.

use crate::image::Image;
use crate::map::each_entry;
use crate::survey::{SlotSet, Survey};
use alloc::format;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};

/// Slots among which gaps are looked for at once: 1 MiB of memory. For each such window that has gaps, the map is read.
const WINDOW: u64 = 1 << 23;

/// The slots of an image that data goes into.
#[derive(Debug)]
pub struct Slots {
    /// One more than the highest slot that is used, or was given out.
    top: u64,
    /// Gaps below the first top that were not given out …
    gaps: u64,
    /// … and from where on they lie.
    from: u64,
    window: Option<(u64, SlotSet)>,
}

impl Slots {
    /// Those that the map leaves.
    pub fn new(survey: &Survey) -> Self {
        Self { top: survey.top, gaps: survey.top - survey.used, from: 0, window: None }
    }

    /// One more than the highest slot that is used or was given out.
    pub fn top(&self) -> u64 {
        self.top
    }

    /// [`Slots::top`] after so many more slots were given out.
    pub fn top_after(&self, more: u64) -> u64 {
        self.top.saturating_add(more.saturating_sub(self.gaps))
    }

    /// Give out none below `slot` any more.
    pub fn skip_to(&mut self, slot: u64) {
        self.top = self.top.max(slot);
        self.gaps = 0;
    }

    /// Give out the lowest slot that nothing uses.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`] if there are no more numbers; I/O errors.
    pub fn take(&mut self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<u32> {
        while self.gaps > 0 && self.from < self.top {
            let start = self.from - self.from % WINDOW;
            if self.window.as_ref().is_none_or(|(first, _)| *first != start) {
                self.window = Some((start, used(io, image, start..self.top.min(start + WINDOW))?));
            }
            let gap = self.window.as_ref().and_then(|(_, used)| used.first_free(self.from));
            match gap {
                Some(slot) => {
                    self.gaps -= 1;
                    self.from = slot + 1;
                    return number(image, slot);
                }
                None => self.from = start + WINDOW,
            }
        }
        self.window = None;
        self.append(image)
    }

    /// Give out the slot behind all others.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`] if there are no more numbers.
    pub fn append(&mut self, image: &Image) -> DriverResult<u32> {
        let slot = number(image, self.top)?;
        self.top += 1;
        Ok(slot)
    }
}

fn number(image: &Image, slot: u64) -> DriverResult<u32> {
    // The two highest numbers mean something else.
    u32::try_from(slot).ok().filter(|&slot| slot < u32::MAX - 1).ok_or_else(|| {
        let text = format!("slot {slot} is more than the map can name");
        DriverError::new(ErrorCode::NoSpace, text).at(image.device, 0)
    })
}

/// The slots of a window that the map in the file names. What was given out since lies below it.
fn used(io: &mut dyn BlockIo, image: &Image, window: core::ops::Range<u64>) -> DriverResult<SlotSet> {
    let mut used = SlotSet::of(window)?;
    each_entry(io, image, 0..image.header.blocks, &mut |_, entry| {
        if let Some(slot) = entry.slot() {
            used.add(slot.into());
        }
        Ok(())
    })?;
    Ok(used)
}
