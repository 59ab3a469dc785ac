//! The consistency pass: every table and every grain inside the file, and no two things at one place.
//!
//! What is used is marked in a [bitmap](Used) of sectors. A file that is larger than the bitmap is gone through several times,
//! each time for another [window](Windows) of it: those that anything lies in, by the tables that hold anything.

use crate::image::Image;
use crate::tables::Table;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::table::{Used, Windows, Wrong};
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_vmdk_format::{Grain, GrainMarker, Metadata, SECTOR};

/// Sectors that an entry can name, and what begins at the last of them.
const REACH: u64 = (1 << 32) + (1 << 17);

/// What the pass found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verified {
    /// The number of grains that the layer holds.
    pub grains: u64,
    /// The first sector behind all that is in use.
    pub end: u64,
}

/// A pass over the grains.
struct Pass<'a> {
    /// What of the window is used.
    used: &'a mut Used,
    /// The first pass tells what no window shows.
    first: bool,
    /// Is told each table that holds anything, and of each grain its table and its sectors.
    saw: &'a mut dyn FnMut(usize, Option<&Range<u64>>),
    wrong: Wrong<'a>,
}

impl Image {
    /// Verify all metadata, up to the first fault.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn verify(&self, io: &mut dyn BlockIo) -> DriverResult<Verified> {
        self.survey(io, &mut |offset, text| Err(self.corrupt(offset, text)))
    }

    /// Go through all metadata, and tell what is wrong with it.
    ///
    /// # Errors
    /// Those of `wrong`; I/O errors.
    pub fn survey(&self, io: &mut dyn BlockIo, wrong: Wrong<'_>) -> DriverResult<Verified> {
        self.verify_fixed(wrong)?;
        let sound = self.sound_tables(wrong)?;
        let mut windows = Windows::over(io, self.file_length.div_ceil(SECTOR).min(REACH), 1);
        let mut holding = Used::of(0..self.directory.entries.len() as u64)?;
        let mut found = Verified::default();
        while let Some(window) = windows.next_window() {
            let mut used = Used::of(window)?;
            self.each_metadata(&mut |(sectors, what)| {
                found.end = found.end.max(sectors.end);
                windows.reach(&sectors);
                if used.add_all(&sectors) {
                    return Ok(());
                }
                let text = format!("the {what} at sector {} overlaps other metadata", sectors.start);
                wrong(sectors.start.saturating_mul(SECTOR), text)
            })?;
            if windows.is_first() {
                let end = &mut found.end;
                let mut saw = |table: usize, sectors: Option<&Range<u64>>| match sectors {
                    Some(sectors) => {
                        *end = sectors.end.max(*end);
                        windows.reach(sectors);
                    }
                    None => drop(holding.add(table as u64)),
                };
                let mut pass = Pass { used: &mut used, first: true, saw: &mut saw, wrong };
                found.grains = self.verify_grains(io, &sound, &mut pass)?;
            } else {
                let mut pass = Pass { used: &mut used, first: false, saw: &mut |_, _| {}, wrong };
                self.verify_grains(io, &holding, &mut pass)?;
            }
        }
        Ok(found)
    }

    /// Those metadata that are there once, which may lie further behind than entries reach.
    fn verify_fixed(&self, wrong: Wrong<'_>) -> DriverResult<()> {
        let fixed = self.fixed_metadata();
        for (index, (sectors, what)) in fixed.iter().enumerate() {
            let overlaps = |(other, _): &&Metadata| sectors.start < other.end && other.start < sectors.end;
            if let Some((_, other)) = fixed.iter().take(index).find(overlaps) {
                let text = format!("the {what} at sector {} overlaps the {other}", sectors.start);
                wrong(sectors.start.saturating_mul(SECTOR), text)?;
            }
        }
        Ok(())
    }

    /// The tables of the first directory that lie in the file.
    fn sound_tables(&self, wrong: Wrong<'_>) -> DriverResult<Used> {
        let mut sound = Used::of(0..self.directory.entries.len() as u64)?;
        for (number, directory) in self.directories().enumerate() {
            for index in directory.present() {
                match self.table_offset(directory, index) {
                    Ok(_) if number == 0 => drop(sound.add(index as u64)),
                    Ok(_) => {}
                    Err(error) => wrong(error.offset.unwrap_or(0), error.text)?,
                }
            }
        }
        Ok(sound)
    }

    /// Everything but grains, as far as it lies in the file.
    fn each_metadata(&self, each: &mut dyn FnMut(Metadata) -> DriverResult<()>) -> DriverResult<()> {
        self.fixed_metadata().into_iter().try_for_each(&mut *each)?;
        for directory in self.directories() {
            for index in directory.present() {
                if let Ok(Some(offset)) = self.table_offset(directory, index) {
                    let sector = offset / SECTOR;
                    each((sector..sector + self.layout.table_bytes() / SECTOR, "grain table"))?;
                }
            }
        }
        Ok(())
    }

    /// Verify the grains of the tables in `only`. Returns how many there are.
    fn verify_grains(&self, io: &mut dyn BlockIo, only: &Used, pass: &mut Pass<'_>) -> DriverResult<u64> {
        let mut grains = 0;
        self.each_tables(io, &self.directory, Some(only), &mut |io, tables| {
            for table in tables.iter().filter(|table| table.holds_anything()) {
                (pass.saw)(table.index, None);
                grains += self.verify_table(io, table, pass)?;
            }
            Ok(())
        })?;
        Ok(grains)
    }

    fn verify_table(&self, io: &mut dyn BlockIo, table: &Table, pass: &mut Pass<'_>) -> DriverResult<u64> {
        let lengths = self.compressed_lengths(io, table)?;
        let mut grains = 0;
        for (entry, &value) in table.entries.iter().enumerate() {
            let guest = self.layout.guest_of(table.index, entry);
            let offset = match self.layout.grain_of(value) {
                Grain::Absent => continue,
                Grain::Zero => {
                    grains += u64::from(guest < self.layout.virtual_size());
                    continue;
                }
                Grain::At(offset) => offset,
            };
            let text = |what: &str| format!("the grain of guest offset {guest}, at sector {value}, {what}");
            let length = match lengths.get(entry) {
                Some(&length) => length,
                None => self.layout.grain_bytes(),
            };
            let end = offset.saturating_add(length);
            // The last grain of a file may have been cut short: the rest reads as zeroes. But what a commit adds begins at the
            // next multiple of a grain, so that no grain may go on behind that.
            let cut = if self.layout.compressed {
                self.file_length
            } else {
                self.file_length.checked_next_multiple_of(self.layout.grain_bytes()).unwrap_or(u64::MAX)
            };
            let outside = if offset >= self.file_length {
                Some("lies past the end of the file")
            } else {
                (end > cut).then_some("goes past the end of the file")
            };
            if let Some(outside) = outside {
                // Later passes see it again.
                if pass.first {
                    (pass.wrong)(offset, text(outside))?;
                }
                continue;
            }
            let end = end.min(self.file_length);
            let sectors = offset / SECTOR..end.div_ceil(SECTOR);
            (pass.saw)(table.index, Some(&sectors));
            if !pass.used.add_all(&sectors) {
                (pass.wrong)(offset, text("overlaps metadata or another grain"))?;
            }
            grains += 1;
        }
        Ok(grains)
    }

    /// For an image with compressed grains: what each entry's marker and stream take, in bytes.
    fn compressed_lengths(&self, io: &mut dyn BlockIo, table: &Table) -> DriverResult<Vec<u64>> {
        if !self.layout.compressed {
            return Ok(Vec::new());
        }
        let mut markers = vec![[0u8; GrainMarker::BYTES]; table.entries.len()];
        let mut requests = Vec::new();
        for (&value, marker) in table.entries.iter().zip(&mut markers) {
            if let Some(offset) = self.layout.grain_of(value).offset().filter(|&offset| offset < self.file_length) {
                let (buffer, length) = (marker.as_mut_ptr() as u64, marker.len() as u64);
                requests.push(Request::read(self.device, offset, buffer, length));
            }
        }
        if !requests.is_empty() {
            io.run(&mut requests)?;
        }
        Ok(markers.iter().map(|marker| GrainMarker::parse(marker).stored()).collect())
    }
}
