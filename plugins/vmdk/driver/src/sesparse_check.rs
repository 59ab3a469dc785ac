//! The consistency pass over a seSparse extent: every table and every grain inside the file, and none of them used twice.
//! What its journal, free bitmap and back map say is not looked at: nobody but VMware knows.

use crate::failures::at;
use crate::sesparse::{SeSparse, SeTable};
use alloc::format;
use instar_guest_sdk::table::{Used, Windows};
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_vmdk_format::{SeGrain, SECTOR, SESPARSE_COVERAGE, SESPARSE_GRAIN_BYTES, SESPARSE_MAX_TABLES};

impl SeSparse {
    /// Verify all metadata. Returns the number of grains that the layer holds.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn verify(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let room = self.file_length.saturating_sub(self.header.grains.offset.saturating_mul(SECTOR));
        let mut windows = Windows::over(io, room.div_ceil(SESPARSE_GRAIN_BYTES), 1);
        let mut holding = Used::of(0..self.header.directory_entries())?;
        let mut numbers = Used::of(0..SESPARSE_MAX_TABLES)?;
        let mut held = 0;
        while let Some(window) = windows.next_window() {
            let mut used = Used::of(window)?;
            if windows.is_first() {
                held = self.verify_tables(io, None, &mut used, &mut |table, number| match number {
                    Some(number) => {
                        windows.reach(&(number..number + 1));
                        true
                    }
                    None => {
                        holding.add(table.index);
                        numbers.add(table.number)
                    }
                })?;
            } else {
                self.verify_tables(io, Some(&holding), &mut used, &mut |_, _| true)?;
            }
        }
        Ok(held)
    }

    /// Verify the tables with the indices in `only`, or all. `saw` is told each table that holds anything, and of each grain
    /// its number; it says of a table whether it is a new one.
    fn verify_tables(
        &mut self,
        io: &mut dyn BlockIo,
        only: Option<&Used>,
        used: &mut Used,
        saw: &mut dyn FnMut(&SeTable, Option<u64>) -> bool,
    ) -> DriverResult<u64> {
        let (mut held, mut index, end) = (0, 0, self.header.directory_entries());
        while index < end {
            if only.is_some_and(|only| !only.contains(index)) {
                index += 1;
                continue;
            }
            self.load(io, index, end)?;
            let (looked_at, tables) = self.tables();
            for table in tables.iter().filter(|table| table.index >= index) {
                if !saw(table, None) {
                    let text = format!("grain table {} is used twice", table.number);
                    return Err(self.corrupt(0, text));
                }
                held += self.verify_table(table, used, saw)?;
            }
            index = looked_at.end.max(index + 1);
        }
        Ok(held)
    }

    fn verify_table(
        &self,
        table: &SeTable,
        used: &mut Used,
        saw: &mut dyn FnMut(&SeTable, Option<u64>) -> bool,
    ) -> DriverResult<u64> {
        let mut held = 0;
        let start = table.index.saturating_mul(SESPARSE_COVERAGE);
        for (&entry, index) in table.entries.iter().zip(0u64..) {
            let guest = start.saturating_add(index * SESPARSE_GRAIN_BYTES);
            let number = match SeGrain::decode(entry).map_err(at(self.code(), self.device, 0))? {
                SeGrain::Absent => continue,
                SeGrain::Zero => {
                    held += u64::from(guest < self.header.virtual_size());
                    continue;
                }
                SeGrain::Number(number) => number,
            };
            let offset = self.grain_offset(guest, number)?;
            saw(table, Some(number));
            if !used.add(number) {
                let text = format!("the grain of guest offset {guest}, number {number}, is used twice");
                return Err(self.corrupt(offset, text));
            }
            held += 1;
        }
        Ok(held)
    }
}
