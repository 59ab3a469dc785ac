//! The consistency pass: every entry of the map names a slot that lies in the file, and no two name the same one.
//!
//! What is used is marked in a bitmap of slots, a [window](Windows) of them at a time.

use crate::image::Image;
use crate::map::each_entry;
use alloc::format;
use instar_guest_sdk::table::{Used, Windows, Wrong};
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_vdi_format::Entry;

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

/// Go through the map. What is wrong goes to `wrong`, which may end the pass.
///
/// # Errors
/// Those of `wrong`; I/O errors.
pub fn survey(io: &mut dyn BlockIo, image: &Image, wrong: Wrong<'_>) -> DriverResult<Survey> {
    let mut found = Survey::default();
    let mut windows = Windows::over(io, image.slots_in_file().min(REACH), 1);
    while let Some(window) = windows.next_window() {
        let mut used = Used::of(window)?;
        let mut pass = Pass { image, windows: &mut windows, before: None, found: &mut found };
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

/// A pass over the map; what it counts and tells, it does in the first window only.
struct Pass<'a> {
    image: &'a Image,
    windows: &'a mut Windows,
    /// The slot of the last block that has one.
    before: Option<u32>,
    found: &'a mut Survey,
}

impl Pass<'_> {
    fn entry(&mut self, block: u32, entry: Entry, wrong: Wrong<'_>) -> DriverResult<()> {
        if !self.windows.is_first() {
            return Ok(());
        }
        let in_disk = block < self.image.disk_blocks();
        *(if in_disk { &mut self.found.held } else { &mut self.found.beyond }) += u64::from(entry != Entry::Free);
        let Some(slot) = entry.slot() else { return Ok(()) };
        let place = crate::map::offset_of(self.image, block.into());
        if !self.image.holds_slot(slot) {
            let text = format!("block {block} of the disk is in slot {slot}, past the end of the file");
            return wrong(place, text);
        }
        self.windows.reach(&(slot.into()..u64::from(slot) + 1));
        self.found.used += 1;
        self.found.top = self.found.top.max(u64::from(slot) + 1);
        self.found.fragmented += u64::from(self.before.is_some_and(|before| before.checked_add(1) != Some(slot)));
        self.before = Some(slot);
        Ok(())
    }
}
