//! The two copies of the grain tables of a hosted extent, entry by entry.
//!
//! QEMU reads and writes the first directory's, and writes the second's after that; VMware says of the second only that it is
//! redundant. So the first copy counts, but for an entry that cannot be right, because it names a place past the end of the
//! file: there, the second one counts if it can be. Two entries that name different grains of the file have no right answer.
//! Nor have a first one that is 0 and a second one that is not, because a table that was overwritten with zeroes looks
//! the same: the second copy may be all that is left of it.
//!
//! A commit makes the first copy durable before it writes the second one, and an overlay that is emptied loses its second copy
//! first. So what a power loss leaves is a second copy that says less, or a zero grain of the first that the second has not heard
//! of. Such a second copy is out of date, and no damage.

use crate::image::Image;
use crate::tables::{tables_at_once, Table};
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};

/// A table in both copies.
#[derive(Debug)]
pub struct Pair {
    pub index: usize,
    pub first: Vec<u32>,
    pub second: Vec<u32>,
}

/// What is made of a pair.
#[derive(Debug)]
pub struct Merged {
    pub first: Vec<u32>,
    pub second: Vec<u32>,
    /// Entries that have no right answer; both copies keep theirs.
    pub unclear: usize,
}

impl Merged {
    /// Whether the first copy stays as it is and only the second one is out of date, as a crash leaves it.
    pub fn keeps_first(&self, pair: &Pair) -> bool {
        self.unclear == 0 && self.first == pair.first
    }

    /// Whether this is another pair.
    pub fn changes(&self, pair: &Pair) -> bool {
        self.first != pair.first || self.second != pair.second
    }
}

/// What is done with a pair.
pub type EachPair<'a> = &'a mut dyn FnMut(&mut dyn BlockIo, &Pair) -> DriverResult<()>;

impl Image {
    /// Hand all tables that are there in both copies to `each`, in ascending order.
    ///
    /// # Errors
    /// Those of `each`; I/O errors.
    pub fn each_pair(&self, io: &mut dyn BlockIo, each: EachPair<'_>) -> DriverResult<()> {
        let Some(redundant) = &self.redundant else { return Ok(()) };
        let there = |index: &usize| self.has_both(*index);
        let indices: Vec<usize> = self.directory.present().filter(there).collect();
        for chunk in indices.chunks(tables_at_once(&self.layout).max(1)) {
            let firsts = self.read_tables(io, &self.directory, chunk)?;
            let seconds = self.read_tables(io, redundant, chunk)?;
            for (first, second) in firsts.into_iter().zip(seconds) {
                if first.entries != second.entries {
                    each(io, &Pair { index: first.index, first: first.entries, second: second.entries })?;
                }
            }
        }
        Ok(())
    }

    /// Whether a table is in the file, in both copies.
    fn has_both(&self, index: usize) -> bool {
        self.directories().all(|directory| matches!(self.table_offset(directory, index), Ok(Some(_))))
    }

    /// Take from the second copies of tables what the first ones cannot mean.
    ///
    /// # Errors
    /// I/O errors.
    pub fn merge(&self, io: &mut dyn BlockIo, tables: &mut [Table], indices: &[usize]) -> DriverResult<()> {
        let Some(redundant) = &self.redundant else { return Ok(()) };
        let there: Vec<usize> = indices.iter().copied().filter(|&index| self.has_both(index)).collect();
        let mut seconds = self.read_tables(io, redundant, &there)?.into_iter().peekable();
        for table in tables {
            let Some(second) = seconds.next_if(|second| second.index == table.index) else { continue };
            let first = core::mem::take(&mut table.entries);
            table.entries = self.merged(&Pair { index: table.index, first, second: second.entries }).first;
        }
        Ok(())
    }

    /// What both copies together say.
    pub fn merged(&self, pair: &Pair) -> Merged {
        let names_grain = |entry: u32| self.layout.grain_of(entry).offset().is_some();
        let lies_inside =
            |entry: u32| self.layout.grain_of(entry).offset().is_none_or(|offset| offset < self.file_length);
        let mut merged = Merged { first: pair.first.clone(), second: pair.second.clone(), unclear: 0 };
        for (first, second) in merged.first.iter_mut().zip(&mut merged.second).filter(|(first, second)| first != second)
        {
            match (lies_inside(*first), lies_inside(*second)) {
                (true, false) => *second = *first,
                (true, true) if *first != 0 && (!names_grain(*first) || !names_grain(*second)) => *second = *first,
                (false, true) if *second != 0 => *first = *second,
                _ => merged.unclear += 1,
            }
        }
        merged
    }
}
