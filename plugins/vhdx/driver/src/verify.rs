//! The consistency pass: every block inside the file, and no two things at one place.
//!
//! Everything stands at whole MiB of the file, so a bit for each of them tells what is taken.

use crate::image::{Image, Place};
use crate::table::Table;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_vhdx_format::{Entry, ALIGNMENT, BITMAP_BLOCK, LONGEST_FILE};

/// Entries of the table that are read at once.
const ENTRIES: u64 = 1 << 16;

/// What the pass learns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Survey {
    /// Blocks of which the image holds something, zeroes included.
    pub held: u64,
    /// Sector bitmap blocks.
    pub bitmaps: u64,
    /// The end in bytes of the last thing that is in the file: whole MiB.
    pub end: u64,
    /// Blocks that do not follow the one before them in the file.
    pub fragmented: u64,
    /// Bytes of the file that entries reserve for blocks which are zeroes now.
    reserved: u64,
    /// Bytes before the end that nothing takes.
    pub unused: u64,
}

/// What is told of a contradiction: the byte of the file that makes it, and one clause.
pub type Complain<'a> = &'a mut dyn FnMut(u64, String) -> DriverResult<()>;

/// Whole MiB of the file that are taken.
struct Taken {
    bits: Vec<u64>,
}

impl Taken {
    /// Take a range of bytes. Returns the first byte of it that was taken before.
    fn take(&mut self, range: Range<u64>) -> Option<u64> {
        let mut twice = None;
        for unit in range.start / ALIGNMENT..range.end.div_ceil(ALIGNMENT) {
            let (word, bit) = (usize::try_from(unit / 64).unwrap_or(usize::MAX), 1 << (unit % 64));
            // What lies past the end of the file was told of already.
            let Some(word) = self.bits.get_mut(word) else { break };
            if *word & bit != 0 {
                twice = twice.or(Some(unit * ALIGNMENT));
            }
            *word |= bit;
        }
        twice
    }

    /// Bytes before byte `end` that nothing takes.
    fn unused(&self, end: u64) -> u64 {
        let taken: u64 = self.bits.iter().map(|word| u64::from(word.count_ones())).sum();
        end.saturating_sub(taken.saturating_mul(ALIGNMENT))
    }
}

impl Image {
    /// Verify all metadata: of two things that contradict each other, nobody knows which is right.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn verify(&self, io: &mut dyn BlockIo) -> DriverResult<Survey> {
        self.survey(io, &mut |offset, text| Err(self.corrupt(offset, text)))
    }

    /// Go through the block allocation table, and tell `complain` what is wrong.
    ///
    /// # Errors
    /// Those of `complain`; I/O errors; a file that is longer than any image.
    pub fn survey(&self, io: &mut dyn BlockIo, complain: Complain<'_>) -> DriverResult<Survey> {
        let length = self.opened.file_length;
        let units = Self::in_memory(length.div_ceil(ALIGNMENT).div_ceil(64))?;
        let (bytes, heap) = (units.saturating_mul(8), io.heap_free());
        if length > LONGEST_FILE {
            let text = format!("the file has {length} bytes, and no VHDX needs more than {LONGEST_FILE}");
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.device, 0));
        }
        if bytes > heap / 2 {
            let text = format!("verifying takes {bytes} bytes, and of the memory of the sandbox {heap} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.device, 0));
        }
        let mut taken = Taken { bits: vec![0; units] };
        for (range, _) in self.taken() {
            taken.take(range.clone());
        }
        let mut survey = Survey { end: self.metadata_end(), ..Survey::default() };
        let mut pass = Pass { survey: &mut survey, taken: &mut taken, follows: None, partial: None };
        Table::each(io, self, ENTRIES, &mut |table| {
            pass.miss_bitmap(self, table, complain)?;
            table.iter().try_for_each(|(number, entry)| match self.layout.entry_of(number) {
                Ok(block) if block < self.layout.blocks() => pass.payload(self, block, entry, complain),
                // The last chunk has entries of blocks that the disk does not have.
                Ok(_) => Ok(()),
                Err(block) => pass.bitmap(self, block, entry, complain),
            })
        })?;
        survey.unused = taken.unused(survey.end.min(length)).saturating_sub(survey.reserved);
        Ok(survey)
    }
}

/// The pass over the entries.
struct Pass<'a> {
    survey: &'a mut Survey,
    taken: &'a mut Taken,
    /// The end of the block before.
    follows: Option<u64>,
    /// The first block of the chunk that is partially present.
    partial: Option<u64>,
}

impl Pass<'_> {
    fn payload(&mut self, image: &Image, block: u64, entry: Entry, complain: Complain<'_>) -> DriverResult<()> {
        let (offset, partial) = match image.block_place(block, entry) {
            Err(error) => return complain(error.offset.unwrap_or(0), error.text),
            Ok(Place::Nowhere) => return Ok(()),
            Ok(Place::Zero) => {
                self.survey.held += 1;
                let length = image.layout.block_size;
                let reserved = entry.reservation().and_then(|offset| Some(offset..offset.checked_add(length)?));
                if let Some(range) = reserved.filter(|range| range.end <= image.opened.file_length) {
                    // Nothing is put there, and nothing of it is read.
                    self.survey.end = self.survey.end.max(range.end);
                    self.survey.reserved += length;
                }
                return Ok(());
            }
            Ok(Place::Whole(offset)) => (offset, false),
            Ok(Place::Partial(offset)) => (offset, true),
        };
        let end = offset.saturating_add(image.layout.block_size);
        self.partial = self.partial.or(Some(block).filter(|_| partial));
        self.survey.held += 1;
        self.survey.fragmented += u64::from(self.follows.is_some_and(|end| end != offset));
        self.follows = Some(end);
        self.take(offset..end, image, image.layout.payload_entry(block), complain)
    }

    fn bitmap(&mut self, image: &Image, block: u64, entry: Entry, complain: Complain<'_>) -> DriverResult<()> {
        let partial = self.partial.take();
        match image.bitmap_place(block, entry) {
            Err(error) => complain(error.offset.unwrap_or(0), error.text),
            Ok(None) => partial.map_or(Ok(()), |block| missing(image, block, complain)),
            Ok(Some(offset)) => {
                self.survey.bitmaps += 1;
                self.take(
                    offset..offset.saturating_add(BITMAP_BLOCK),
                    image,
                    image.layout.bitmap_entry(block),
                    complain,
                )
            }
        }
    }

    fn take(&mut self, range: Range<u64>, image: &Image, entry: u64, complain: Complain<'_>) -> DriverResult<()> {
        self.survey.end = self.survey.end.max(range.end);
        match self.taken.take(range) {
            None => Ok(()),
            Some(twice) => {
                let text =
                    format!("entry {entry} of the block allocation table names byte {twice}, which is taken already");
                complain(image.entry_place(entry), text)
            }
        }
    }

    /// Of a window whose entries are all 0, no bitmap is there.
    fn miss_bitmap(&mut self, image: &Image, table: &Table, complain: Complain<'_>) -> DriverResult<()> {
        let Some(block) = self.partial else { return Ok(()) };
        let all_zero = table.iter().next().is_none();
        if all_zero && table.range().contains(&image.layout.bitmap_entry(block)) {
            self.partial = None;
            return missing(image, block, complain);
        }
        Ok(())
    }
}

fn missing(image: &Image, block: u64, complain: Complain<'_>) -> DriverResult<()> {
    let text = format!("block {block} is partially present, and its sector bitmap is not there");
    complain(image.entry_place(image.layout.payload_entry(block)), text)
}
