//! The consistency pass: every table and every grain inside the file, and no two things at one place.
//!
//! What is used is marked in a bitmap of sectors. A file that is larger than the bitmap is gone through several times, each
//! time for another window of it: those that anything lies in, by the tables that hold anything.

use crate::image::Image;
use crate::tables::{Table, TableSet};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vmdk_format::{Grain, COMPRESSED_MARKER_BYTES, FOOTER_BYTES, SECTOR, TABLE_BYTES, TABLE_ENTRIES};

/// Sectors of the file that are looked at in one go: 64 GiB of it, 16 MiB of memory; less where the heap is small …
const WINDOW: u64 = 1 << 27;
/// … but not less than this: 1 GiB.
const MIN_WINDOW: u64 = 1 << 21;
/// Sectors that an entry can name, and what begins at the last of them.
const REACH: u64 = (1 << 32) + (1 << 17);

/// A piece of metadata: its sectors, and what it is.
pub type Metadata = (Range<u64>, &'static str);

/// What the first pass learns for those after it.
struct Survey {
    /// Sectors of a window.
    window: u64,
    /// By window: a grain lies in it.
    reached: Vec<bool>,
    /// The tables that hold anything.
    tables: TableSet,
}

impl Survey {
    fn reach(&mut self, sectors: &Range<u64>) {
        let last = sectors.end.saturating_sub(1).max(sectors.start) / self.window;
        for window in sectors.start / self.window..=last {
            let index = usize::try_from(window).unwrap_or(usize::MAX);
            self.reached.get_mut(index).into_iter().for_each(|reached| *reached = true);
        }
    }
}

/// The sectors of a window that are used.
struct Used {
    window: Range<u64>,
    words: Vec<u64>,
}

impl Used {
    fn new(window: Range<u64>) -> DriverResult<Self> {
        let words = usize::try_from((window.end - window.start).div_ceil(64)).map_err(|_| overflow("a window"))?;
        Ok(Self { window, words: vec![0; words] })
    }

    /// Mark what of `sectors` lies in the window. `false` if any was marked before.
    fn mark(&mut self, sectors: &Range<u64>) -> bool {
        let (mut at, end) = (sectors.start.max(self.window.start), sectors.end.min(self.window.end));
        let mut free = true;
        while at < end {
            let bit = (at - self.window.start) % 64;
            let count = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let index = usize::try_from((at - self.window.start) / 64).unwrap_or(usize::MAX);
            match self.words.get_mut(index) {
                Some(word) => {
                    free &= *word & mask == 0;
                    *word |= mask;
                }
                None => free = false,
            }
            at += count;
        }
        free
    }
}

impl Image {
    /// Verify all metadata. Returns the number of grains that the layer holds.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn verify(&self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.verify_fixed()?;
        // A bit for each sector, and a quarter of the heap.
        let window = WINDOW.min((io.heap_free() as u64).saturating_mul(2)).max(MIN_WINDOW);
        let end = self.file_length.div_ceil(SECTOR).min(REACH);
        let count = usize::try_from(end.div_ceil(window)).map_err(|_| overflow("a window"))?;
        let mut survey = Survey { window, reached: vec![false; count], tables: TableSet::of(self.directory.len()) };
        let mut grains = 0;
        for index in 0..count {
            let start = index as u64 * window;
            let mut used = Used::new(start..end.min(start + window))?;
            self.each_metadata(&mut |(sectors, what)| {
                if used.mark(&sectors) {
                    return Ok(());
                }
                let text = format!("the {what} at sector {} overlaps other metadata", sectors.start);
                Err(self.corrupt(sectors.start.saturating_mul(SECTOR), text))
            })?;
            if index == 0 {
                grains = self.verify_grains(io, None, &mut used, &mut |table, sectors| match sectors {
                    Some(sectors) => survey.reach(sectors),
                    None => survey.tables.add(table),
                })?;
            } else if survey.reached.get(index) == Some(&true) {
                self.verify_grains(io, Some(&survey.tables), &mut used, &mut |_, _| {})?;
            }
        }
        Ok(grains)
    }

    /// Those metadata that are there once, which may lie further behind than entries reach.
    fn verify_fixed(&self) -> DriverResult<()> {
        let fixed = self.fixed_metadata();
        for (index, (sectors, what)) in fixed.iter().enumerate() {
            let overlaps = |(other, _): &&Metadata| sectors.start < other.end && other.start < sectors.end;
            if let Some((_, other)) = fixed.iter().take(index).find(overlaps) {
                let text = format!("the {what} at sector {} overlaps the {other}", sectors.start);
                return Err(self.corrupt(sectors.start.saturating_mul(SECTOR), text));
            }
        }
        Ok(())
    }

    /// Everything but tables and grains.
    pub fn fixed_metadata(&self) -> Vec<Metadata> {
        let header = &self.header;
        let directory = header.directory_entries().saturating_mul(4).div_ceil(SECTOR);
        let at = |sector: u64, length: u64| sector..sector.saturating_add(length);
        let mut parts = vec![
            (0..1, "header"),
            (at(header.descriptor_offset, header.descriptor_size), "descriptor"),
            (at(header.directory, directory), "grain directory"),
        ];
        if self.redundant.is_some() {
            parts.push((at(header.redundant_directory, directory), "redundant grain directory"));
        }
        if self.footer {
            let sectors = FOOTER_BYTES as u64 / SECTOR;
            parts.push((at((self.file_length / SECTOR).saturating_sub(sectors), sectors), "footer"));
        }
        // An extent of several has no descriptor.
        parts.retain(|(sectors, _)| sectors.start < sectors.end);
        parts
    }

    /// Everything but grains.
    fn each_metadata(&self, each: &mut dyn FnMut(Metadata) -> DriverResult<()>) -> DriverResult<()> {
        self.fixed_metadata().into_iter().try_for_each(&mut *each)?;
        for directory in core::iter::once(&self.directory).chain(&self.redundant) {
            for index in 0..directory.len() {
                if let Some(offset) = self.table_offset(directory, index)? {
                    let sector = offset / SECTOR;
                    each((sector..sector + TABLE_BYTES / SECTOR, "grain table"))?;
                }
            }
        }
        Ok(())
    }

    /// Verify the grains of the tables in `only`, or of all. Returns how many there are. `saw` is told each table that holds
    /// anything, and of each grain its table and its sectors.
    fn verify_grains(
        &self,
        io: &mut dyn BlockIo,
        only: Option<&TableSet>,
        used: &mut Used,
        saw: &mut dyn FnMut(usize, Option<&Range<u64>>),
    ) -> DriverResult<u64> {
        let mut grains = 0;
        self.each_tables(io, only, &mut |io, tables| {
            for table in tables.iter().filter(|table| table.holds_anything()) {
                saw(table.index, None);
                grains += self.verify_table(io, table, used, &mut |sectors| saw(table.index, Some(sectors)))?;
            }
            Ok(())
        })?;
        Ok(grains)
    }

    fn verify_table(
        &self,
        io: &mut dyn BlockIo,
        table: &Table,
        used: &mut Used,
        saw: &mut dyn FnMut(&Range<u64>),
    ) -> DriverResult<u64> {
        let lengths = self.compressed_lengths(io, table)?;
        let mut grains = 0;
        for (entry, &value) in table.entries.iter().enumerate() {
            let guest = (table.index as u64 * TABLE_ENTRIES + entry as u64).saturating_mul(self.header.grain_bytes());
            let offset = match Grain::decode(value, self.zeroed_grains()) {
                Grain::Absent => continue,
                Grain::Zero => {
                    grains += u64::from(guest < self.header.virtual_size());
                    continue;
                }
                Grain::At(offset) => offset,
            };
            let wrong = |what: &str| {
                let text = format!("the grain of guest offset {guest}, at sector {value}, {what}");
                self.corrupt(offset, text)
            };
            if offset >= self.file_length {
                return Err(wrong("lies past the end of the file"));
            }
            let length = match lengths.get(entry) {
                Some(&length) => length,
                None => self.header.grain_bytes(),
            };
            let end = offset.saturating_add(length);
            // The last grain of a file may have been cut short: the rest reads as zeroes. But what a commit adds begins at the
            // next multiple of a grain, so that no grain may go on behind that.
            let cut = if self.compressed() {
                self.file_length
            } else {
                self.file_length.checked_next_multiple_of(self.header.grain_bytes()).unwrap_or(u64::MAX)
            };
            if end > cut {
                return Err(wrong("goes past the end of the file"));
            }
            let end = end.min(self.file_length);
            let sectors = offset / SECTOR..end.div_ceil(SECTOR);
            saw(&sectors);
            if !used.mark(&sectors) {
                return Err(wrong("overlaps metadata or another grain"));
            }
            grains += 1;
        }
        Ok(grains)
    }

    /// For an image with compressed grains: what each entry's marker and stream take, in bytes.
    fn compressed_lengths(&self, io: &mut dyn BlockIo, table: &Table) -> DriverResult<Vec<u64>> {
        if !self.compressed() {
            return Ok(Vec::new());
        }
        let size = usize::try_from(COMPRESSED_MARKER_BYTES).map_err(|_| overflow("a marker"))?;
        let mut markers = vec![0u8; table.entries.len() * size];
        let mut requests = Vec::new();
        for (&value, marker) in table.entries.iter().zip(markers.chunks_exact_mut(size)) {
            if let Grain::At(offset) = Grain::decode(value, self.zeroed_grains()) {
                requests.push(Request::read(self.device, offset, marker.as_mut_ptr() as u64, COMPRESSED_MARKER_BYTES));
            }
        }
        if !requests.is_empty() {
            io.run(&mut requests)?;
        }
        let length = |marker: &[u8]| {
            let stream = u32::from_le_bytes([marker[8], marker[9], marker[10], marker[11]]);
            COMPRESSED_MARKER_BYTES + u64::from(stream)
        };
        Ok(markers.chunks_exact(size).map(length).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn marks_what_lies_in_the_window() {
        let mut used = Used::new(100..300).unwrap();
        assert!(used.mark(&(0..101)));
        assert!(!used.mark(&(100..101)));
        assert!(used.mark(&(101..229)));
        assert!(!used.mark(&(228..230)));
        assert!(used.mark(&(230..1000)));
        assert!(!used.mark(&(299..300)));
        assert!(used.mark(&(300..400)) && used.mark(&(300..400)), "not in the window");
    }
}
