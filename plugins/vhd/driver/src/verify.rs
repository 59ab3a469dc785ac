//! The consistency pass: every block inside the file, and no two things at one place.
//!
//! All blocks are as long as each other, so it is enough to sort the places where they begin. A file that is too large for
//! that is gone through several times, each time for another window of it.

use crate::image::Image;
use crate::table::Table;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vhd_format::SECTOR;

/// Places of blocks that are sorted at once: 4 MiB of memory, and 2 TiB of file in blocks of 2 MiB.
const PLACES: usize = 1 << 20;
/// Entries of the table that are read at once.
const ENTRIES: u64 = 1 << 16;

/// What the pass learns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Survey {
    /// Blocks that are there.
    pub held: u64,
    /// The end in bytes of the last block or piece of metadata, at a sector. The footer at the end does not count.
    pub end: u64,
    /// Blocks that do not follow the one before them in the file.
    pub fragmented: u64,
}

/// What is told of a contradiction: the byte of the file that makes it, and one clause.
pub type Complain<'a> = &'a mut dyn FnMut(u64, String) -> DriverResult<()>;

impl Image {
    /// Verify all metadata: of two things that contradict each other, nobody knows which is right.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn verify(&self, io: &mut dyn BlockIo) -> DriverResult<Survey> {
        let survey = self.survey(io, &mut |offset, text| Err(self.corrupt(offset, text)))?;
        self.compare_batmap(io, &mut |offset, text| Err(self.corrupt(offset, text)))?;
        Ok(survey)
    }

    /// Go through all metadata, and tell `complain` what is wrong.
    ///
    /// # Errors
    /// Those of `complain`; I/O errors.
    pub fn survey(&self, io: &mut dyn BlockIo, complain: Complain<'_>) -> DriverResult<Survey> {
        let fixed = self.metadata();
        for (first, second) in fixed.iter().zip(fixed.iter().skip(1)) {
            if second.0.start < first.0.end {
                let text = format!("the {} at byte {} overlaps the {}", second.1, second.0.start, first.1);
                complain(second.0.start, text)?;
            }
        }
        let mut survey = Survey { end: self.metadata_end()?, ..Survey::default() };
        let stride = self.header.stride() / SECTOR;
        let window = stride.saturating_mul(PLACES as u64);
        let count = usize::try_from(self.file_length.div_ceil(SECTOR).div_ceil(window)).unwrap_or(usize::MAX);
        let mut reached = vec![false; count];
        // The end of the last block of the windows before, in sectors.
        let mut last_end = 0;
        for index in 0..count {
            if index > 0 && !reached.get(index).copied().unwrap_or(false) {
                continue;
            }
            let sectors = window.saturating_mul(index as u64)..window.saturating_mul(index as u64 + 1);
            let mut places = Vec::new();
            let mut follows = None;
            Table::each(io, self, ENTRIES, &mut |_, table| {
                for (block, entry) in table.iter() {
                    let place = match self.block_place(block, entry) {
                        Ok(None) => continue,
                        Ok(Some(place)) => place,
                        Err(_) if index > 0 => continue,
                        Err(error) => {
                            complain(error.offset.unwrap_or(0), error.text)?;
                            continue;
                        }
                    };
                    if index == 0 {
                        self.count(&mut survey, &mut follows, place)?;
                        let at = usize::try_from(place / SECTOR / window).unwrap_or(usize::MAX);
                        reached.get_mut(at).into_iter().for_each(|reached| *reached = true);
                    }
                    if sectors.contains(&u64::from(entry)) && places.len() <= PLACES {
                        places.push(entry);
                    }
                }
                Ok(())
            })?;
            // More blocks than fit into the window side by side are found to overlap, however many more there are.
            last_end = apart(&mut places, stride, last_end, complain)?;
        }
        Ok(survey)
    }

    fn count(&self, survey: &mut Survey, follows: &mut Option<u64>, place: u64) -> DriverResult<()> {
        let end = place.checked_add(self.header.stride()).ok_or_else(|| overflow("a block"))?;
        survey.fragmented += u64::from(follows.is_some_and(|free| self.place_behind(free) != Some(place)));
        *follows = Some(end);
        survey.held += 1;
        survey.end = survey.end.max(end);
        Ok(())
    }
}

/// Verify that blocks of `stride` sectors which begin at these sectors do not overlap, nor what ends at sector `last_end`.
/// Returns the end of the last one.
fn apart(places: &mut [u32], stride: u64, mut last_end: u64, complain: Complain<'_>) -> DriverResult<u64> {
    places.sort_unstable();
    for &place in places.iter() {
        let place = u64::from(place);
        if place < last_end {
            complain(place * SECTOR, format!("the block at sector {place} overlaps the one before it"))?;
        }
        last_end = place.saturating_add(stride);
    }
    Ok(last_end)
}
