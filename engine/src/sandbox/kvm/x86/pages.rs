//! The guest's page tables: identity, with the least rights on every page.

use crate::sandbox::memory::LARGE_PAGE;
use crate::sandbox::rights::Rights;
use instar_guest_abi::{GUEST_MEMORY_SIZE, PAGE_SIZE, PAGE_TABLES_ADDR, PAGE_TABLES_SIZE};
use std::collections::BTreeMap;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Set in advance, so that the processor need not write the tables.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

const ENTRIES: usize = 512;
// Index of the tables that are always there.
const ROOT: usize = 0;
const LEVEL3: usize = 1;
const LEVEL2: usize = 2;

/// The bits of an entry for a page with these rights.
fn bits(rights: Rights) -> u64 {
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    PRESENT | ACCESSED | flag(rights.user, USER) | flag(rights.write, WRITE | DIRTY) | flag(!rights.execute, NO_EXECUTE)
}

/// Page tables under construction.
pub struct PageTables {
    tables: Vec<[u64; ENTRIES]>,
    /// Index of the table of small pages, for each large page that has one.
    small: BTreeMap<usize, usize>,
}

impl PageTables {
    /// Tables that map nothing.
    pub fn new() -> Self {
        let mut tables = vec![[0; ENTRIES]; 3];
        tables[ROOT][0] = Self::link(LEVEL3);
        tables[LEVEL3][0] = Self::link(LEVEL2);
        Self { tables, small: BTreeMap::new() }
    }

    fn link(table: usize) -> u64 {
        (PAGE_TABLES_ADDR + table as u64 * PAGE_SIZE) | PRESENT | WRITE | USER | ACCESSED
    }

    /// Map the pages of `start..end` to themselves, with large pages wherever a whole one lies in the range. `None` if the range
    /// is not whole pages of guest memory, is mapped already, or the tables are full.
    pub fn map(&mut self, start: u64, end: u64, rights: Rights) -> Option<()> {
        if !start.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) || start > end || end > GUEST_MEMORY_SIZE
        {
            return None;
        }
        let mut address = start;
        while address < end {
            let large = address.is_multiple_of(LARGE_PAGE) && end - address >= LARGE_PAGE;
            let entry = if large { self.large_entry(address)? } else { self.small_entry(address)? };
            if *entry != 0 {
                return None;
            }
            *entry = address | bits(rights) | if large { LARGE } else { 0 };
            address += if large { LARGE_PAGE } else { PAGE_SIZE };
        }
        Some(())
    }

    fn large_entry(&mut self, address: u64) -> Option<&mut u64> {
        let index = usize::try_from(address / LARGE_PAGE).ok()?;
        self.tables.get_mut(LEVEL2)?.get_mut(index)
    }

    fn small_entry(&mut self, address: u64) -> Option<&mut u64> {
        let large = usize::try_from(address / LARGE_PAGE).ok()?;
        let table = match self.small.get(&large) {
            Some(&table) => table,
            None => {
                let table = self.tables.len();
                if (table as u64 + 1) * PAGE_SIZE > PAGE_TABLES_SIZE {
                    return None;
                }
                let entry = self.large_entry(address)?;
                if *entry != 0 {
                    return None;
                }
                *entry = Self::link(table);
                self.tables.push([0; ENTRIES]);
                self.small.insert(large, table);
                table
            }
        };
        let index = usize::try_from(address % LARGE_PAGE / PAGE_SIZE).ok()?;
        self.tables.get_mut(table)?.get_mut(index)
    }

    /// The tables as they stand from [`PAGE_TABLES_ADDR`] on; the first is the root.
    pub fn bytes(&self) -> Vec<u8> {
        self.tables.iter().flatten().flat_map(|entry| entry.to_le_bytes()).collect()
    }
}

#[cfg(test)]
pub mod walk {
    //! A page walk as the processor does it.
    use super::*;

    fn entry(bytes: &[u8], table: u64, index: u64) -> u64 {
        let at = usize::try_from(table - PAGE_TABLES_ADDR + index * 8).unwrap_or(usize::MAX);
        bytes.get(at..at + 8).map_or(0, |slice| u64::from_le_bytes(slice.try_into().unwrap_or_default()))
    }

    /// Where `address` leads and what may be done there.
    pub fn walk(bytes: &[u8], address: u64) -> Option<(u64, Rights)> {
        let mut table = PAGE_TABLES_ADDR;
        let mut rights = Rights { user: true, write: true, execute: true };
        for level in (0..4).rev() {
            let shift = 12 + 9 * level;
            let found = entry(bytes, table, address >> shift & 511);
            if found & PRESENT == 0 {
                return None;
            }
            rights.user &= found & USER != 0;
            rights.write &= found & WRITE != 0;
            rights.execute &= found & NO_EXECUTE == 0;
            let target = found & 0x000f_ffff_ffff_f000;
            if level == 0 || found & LARGE != 0 {
                let mask = (1 << shift) - 1;
                return Some(((target & !mask) | (address & mask), rights));
            }
            table = target;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::walk::walk;
    use super::*;

    #[test]
    fn pages_have_the_rights_they_were_given() {
        let mut tables = PageTables::new();
        tables.map(0x1000, 0x3000, Rights::SYSTEM_READ).unwrap();
        tables.map(0x5000, 0x6000, Rights::DATA).unwrap();
        tables.map(0x1f_f000, 0x20_1000, Rights::CODE).unwrap();
        tables.map(4 << 20, 8 << 20, Rights::DATA).unwrap();
        let bytes = tables.bytes();
        for (address, rights) in [
            (0, None),
            (0xfff, None),
            (0x1000, Some(Rights::SYSTEM_READ)),
            (0x2fff, Some(Rights::SYSTEM_READ)),
            (0x3000, None),
            (0x5123, Some(Rights::DATA)),
            (0x1f_ffff, Some(Rights::CODE)),
            (0x20_0fff, Some(Rights::CODE)),
            (0x20_1000, None),
            (4 << 20, Some(Rights::DATA)),
            ((8 << 20) - 1, Some(Rights::DATA)),
            (8 << 20, None),
            (GUEST_MEMORY_SIZE, None),
            (1 << 30, None),
            (1 << 40, None),
            (0xffff_8000_0000_0000, None),
        ] {
            assert_eq!(walk(&bytes, address), rights.map(|rights| (address, rights)), "{address:#x}");
        }
    }

    #[test]
    fn a_range_that_begins_within_a_large_page_goes_on_with_large_ones() {
        let mut tables = PageTables::new();
        let (start, end) = ((4 << 20) - PAGE_SIZE, (8 << 20) + PAGE_SIZE);
        tables.map(start, end, Rights::DATA).unwrap();
        // The three that are always there, and one for each end.
        assert_eq!(tables.tables.len(), 5);
        let bytes = tables.bytes();
        for address in [start, 4 << 20, (6 << 20) - 1, 6 << 20, (8 << 20) - 8, 8 << 20, end - 1] {
            assert_eq!(walk(&bytes, address), Some((address, Rights::DATA)), "{address:#x}");
        }
        assert_eq!((walk(&bytes, start - 1), walk(&bytes, end)), (None, None));
    }

    #[test]
    fn nonsense_is_not_mapped() {
        let mut tables = PageTables::new();
        assert!(tables.map(0x1001, 0x2000, Rights::DATA).is_none());
        assert!(tables.map(0x2000, 0x1000, Rights::DATA).is_none());
        assert!(tables.map(0, GUEST_MEMORY_SIZE + PAGE_SIZE, Rights::DATA).is_none());
        tables.map(0x1000, 0x2000, Rights::DATA).unwrap();
        assert!(tables.map(0x1000, 0x2000, Rights::CODE).is_none(), "mapped twice");
        tables.map(2 << 20, 4 << 20, Rights::DATA).unwrap();
        assert!(tables.map(2 << 20, (2 << 20) + 4096, Rights::CODE).is_none(), "small within large");
    }

    #[test]
    fn all_of_memory_fits_in_small_pages() {
        let mut tables = PageTables::new();
        tables.map(PAGE_SIZE, GUEST_MEMORY_SIZE, Rights::DATA).unwrap();
        assert!(tables.bytes().len() as u64 <= PAGE_TABLES_SIZE);
    }
}
