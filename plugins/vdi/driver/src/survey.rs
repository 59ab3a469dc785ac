//! The consistency pass: every entry of the map names a slot that lies in the file, and no two name the same one.
//!
//! What is used is marked in a bitmap of slots. A file with more slots than the bitmap has bits is gone through several
//! times, each time for another window of it in which anything lies.

use crate::image::Image;
use crate::map::each_entry;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vdi_format::Entry;

/// Slots that are looked at in one go: 8 MiB of memory, and 64 TiB with blocks of 1 MiB; less where the heap is small …
const WINDOW: u64 = 1 << 26;
/// … but not less than this: 128 KiB of memory.
const LEAST_WINDOW: u64 = 1 << 20;
/// Slots that an entry can name.
const REACH: u64 = 1 << 32;

/// What the map says, all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Blocks of the disk that the image holds, data and zeroes.
    pub held: u64,
    /// Slots that are used.
    pub used: u64,
    /// One more than the highest of them.
    pub top: u64,
    /// Of these, those that do not follow the slot of the block before.
    pub fragmented: u64,
    /// Entries behind those of the disk's blocks that say anything.
    pub beyond: u64,
}

/// What is wrong with an image: a clause, and the byte of the file that it is about.
pub type Wrong<'a> = &'a mut dyn FnMut(u64, String) -> DriverResult<()>;

/// Slots of which some are used.
#[derive(Debug)]
pub struct SlotSet {
    window: Range<u64>,
    words: Vec<u64>,
}

impl SlotSet {
    /// None of the slots in a window.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn of(window: Range<u64>) -> DriverResult<Self> {
        let count = window.end.saturating_sub(window.start).div_ceil(64);
        Ok(Self { window, words: vec![0; usize::try_from(count).map_err(|_| overflow("a window of slots"))?] })
    }

    fn place(&self, slot: u64) -> Option<(usize, u64)> {
        let index = slot.checked_sub(self.window.start).filter(|_| slot < self.window.end)?;
        Some((usize::try_from(index / 64).ok()?, 1 << (index % 64)))
    }

    /// Add a slot, if it lies in the window. `false` if it was there before.
    pub fn add(&mut self, slot: u64) -> bool {
        let Some((index, bit)) = self.place(slot) else { return true };
        let Some(word) = self.words.get_mut(index) else { return true };
        let free = *word & bit == 0;
        *word |= bit;
        free
    }

    /// The first slot of the window, from `from` on, that is not in the set.
    pub fn first_free(&self, from: u64) -> Option<u64> {
        let free = |slot: &u64| {
            self.place(*slot).and_then(|(index, bit)| Some(self.words.get(index)? & bit == 0)).unwrap_or(false)
        };
        (from.max(self.window.start)..self.window.end).find(free)
    }
}

/// Go through the map. What is wrong goes to `wrong`, which may end the pass.
///
/// # Errors
/// Those of `wrong`; I/O errors.
pub fn survey(io: &mut dyn BlockIo, image: &Image, wrong: Wrong<'_>) -> DriverResult<Survey> {
    // A bit for each slot, and a quarter of the heap.
    let size = WINDOW.min((io.heap_free() as u64).saturating_mul(2)).max(LEAST_WINDOW);
    let slots = image.slots_in_file().clamp(1, REACH);
    let windows = slots.div_ceil(size);
    let mut reached = vec![false; usize::try_from(windows).map_err(|_| overflow("a window of slots"))?];
    let mut found = Survey::default();
    for index in 0..windows {
        let first = index == 0;
        if !first && reached.get(usize::try_from(index).unwrap_or(usize::MAX)) != Some(&true) {
            continue;
        }
        let start = index * size;
        let mut used = SlotSet::of(start..(start + size).min(slots))?;
        let reached = first.then_some(&mut reached);
        let mut pass = Pass { image, size, before: None, found: &mut found, reached };
        each_entry(io, image, 0..image.header.blocks, &mut |block, entry| {
            pass.entry(block, entry, &mut *wrong)?;
            let slot = entry.slot().filter(|&slot| image.holds_slot(slot));
            if slot.is_some_and(|slot| !used.add(slot.into())) {
                let text = format!("block {block} of the disk lies in the same place as another one");
                wrong(crate::map::offset_of(image, block.into()), text)?;
            }
            Ok(())
        })?;
    }
    Ok(found)
}

/// [`survey`] of an image in which nothing may be wrong.
///
/// # Errors
/// Corruption and I/O errors.
pub fn verified(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Survey> {
    survey(io, image, &mut |offset, text| Err(image.corrupt(offset, text)))
}

/// What is looked at in the first window's pass only.
struct Pass<'a> {
    image: &'a Image,
    /// Slots of a window.
    size: u64,
    /// The slot of the last block that has one.
    before: Option<u32>,
    found: &'a mut Survey,
    reached: Option<&'a mut Vec<bool>>,
}

impl Pass<'_> {
    fn entry(&mut self, block: u32, entry: Entry, wrong: Wrong<'_>) -> DriverResult<()> {
        let Some(reached) = &mut self.reached else { return Ok(()) };
        let in_disk = block < self.image.disk_blocks();
        *(if in_disk { &mut self.found.held } else { &mut self.found.beyond }) += u64::from(entry != Entry::Free);
        let Some(slot) = entry.slot() else { return Ok(()) };
        let place = crate::map::offset_of(self.image, block.into());
        if !self.image.holds_slot(slot) {
            let text = format!("block {block} of the disk is in slot {slot}, past the end of the file");
            return wrong(place, text);
        }
        let window = usize::try_from(u64::from(slot) / self.size).unwrap_or(usize::MAX);
        reached.get_mut(window).into_iter().for_each(|reached| *reached = true);
        self.found.used += 1;
        self.found.top = self.found.top.max(u64::from(slot) + 1);
        self.found.fragmented += u64::from(self.before.is_some_and(|before| before.checked_add(1) != Some(slot)));
        self.before = Some(slot);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_set_knows_the_slots_of_its_window() {
        let mut set = SlotSet::of(100..300).unwrap();
        assert!(set.add(5) && set.add(5), "not in the window");
        assert_eq!(set.first_free(0), Some(100));
        assert!(set.add(100) && set.add(101) && !set.add(101) && set.add(299) && set.add(300));
        assert_eq!((set.first_free(100), set.first_free(200), set.first_free(299)), (Some(102), Some(200), None));
    }
}
