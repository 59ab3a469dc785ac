//! The consistency pass: every table and every grain inside the file, and no two things at one place.
//!
//! What is used is marked in a bitmap of sectors. A file that is larger than the bitmap is gone through several times, each
//! time for another window of it.

use crate::image::{overflow, Image};
use crate::tables::Table;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_vmdk_format::{Grain, COMPRESSED_MARKER_BYTES, FOOTER_BYTES, SECTOR, TABLE_BYTES, TABLE_ENTRIES};

/// Sectors of the file that are looked at in one go: 64 GiB of it, 16 MiB of memory.
const WINDOW: u64 = 1 << 27;

/// The sectors of a window that are used.
struct Used {
    window: Range<u64>,
    words: Vec<u64>,
    /// The numbers of the windows in which anything was to be marked.
    reached: BTreeSet<u64>,
    /// The one that was noted last.
    last: (u64, u64),
}

impl Used {
    fn new(window: Range<u64>) -> DriverResult<Self> {
        let words = usize::try_from((window.end - window.start).div_ceil(64)).map_err(|_| overflow("a window"))?;
        Ok(Self { window, words: vec![0; words], reached: BTreeSet::new(), last: (u64::MAX, 0) })
    }

    /// Mark what of `sectors` lies in the window. `false` if any was marked before.
    fn mark(&mut self, sectors: &Range<u64>) -> bool {
        // Nothing is longer than a window.
        let windows = (sectors.start / WINDOW, sectors.end.saturating_sub(1) / WINDOW);
        if windows != self.last && !sectors.is_empty() {
            self.reached.extend([windows.0, windows.1]);
            self.last = windows;
        }
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
        let file = self.file_length.div_ceil(SECTOR);
        // The first pass finds out how far anything reaches: a file may be much longer, and most of it a hole.
        let (grains, mut reached) = self.verify_window(io, 0..file.min(WINDOW))?;
        reached.remove(&0);
        let starts = reached.into_iter().map(|window| window.saturating_mul(WINDOW));
        for start in starts.filter(|&start| start < file) {
            self.verify_window(io, start..file.min(start.saturating_add(WINDOW)))?;
        }
        Ok(grains)
    }

    /// Everything but grains: sectors, and what it is.
    pub fn metadata(&self) -> DriverResult<Vec<(Range<u64>, &'static str)>> {
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
        for directory in core::iter::once(&self.directory).chain(&self.redundant) {
            for index in 0..directory.len() {
                if let Some(offset) = self.table_offset(directory, index)? {
                    parts.push((at(offset / SECTOR, TABLE_BYTES / SECTOR), "grain table"));
                }
            }
        }
        Ok(parts)
    }

    /// Returns the number of grains, and the windows that anything in the file lies in.
    fn verify_window(&self, io: &mut dyn BlockIo, window: Range<u64>) -> DriverResult<(u64, BTreeSet<u64>)> {
        let mut used = Used::new(window)?;
        for (sectors, what) in self.metadata()? {
            if !used.mark(&sectors) {
                let text = format!("the {what} at sector {} overlaps other metadata", sectors.start);
                return Err(self.corrupt(sectors.start.saturating_mul(SECTOR), text));
            }
        }
        let mut grains = 0;
        self.each_tables(io, &mut |io, tables| {
            for table in tables.iter().filter(|table| !table.is_empty()) {
                grains += self.verify_table(io, table, &mut used)?;
            }
            Ok(())
        })?;
        Ok((grains, used.reached))
    }

    fn verify_table(&self, io: &mut dyn BlockIo, table: &Table, used: &mut Used) -> DriverResult<u64> {
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
            if !used.mark(&(offset / SECTOR..end.div_ceil(SECTOR))) {
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
