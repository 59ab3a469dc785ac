//! Entries that are changed in memory, until what they name is durable.

use crate::window::{little_endian, Window};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, OrderedWriter};
use instar_parallels_format::{Header, SECTOR};

/// Sectors of the BAT that are held at most: 4 MiB. Whoever changes more entries writes them in between.
const MOST: usize = 8192;
/// Bytes of an entry.
const ENTRY: usize = 4;

/// A sector of the file of which some entries differ from what is in it. What lies between two of them belongs to the BAT, too.
#[derive(Debug)]
struct Sector {
    bytes: Vec<u8>,
    /// Where the first of the changed entries begins, and where the last of them ends.
    changed: (usize, usize),
}

/// Changed entries, by their sectors.
#[derive(Debug, Default)]
pub struct Changes {
    sectors: BTreeMap<u64, Sector>,
}

impl Changes {
    /// The entry of a cluster of the disk, if its sector is held.
    pub fn get(&self, cluster: u64) -> Option<u32> {
        let at = Header::entry_place(cluster);
        let sector = self.sectors.get(&(at - at % SECTOR))?;
        let start = usize::try_from(at % SECTOR).ok()?;
        sector.bytes.get(start..start.checked_add(ENTRY)?).map(little_endian)
    }

    /// Change the entry of a cluster of the disk. Its sector is held already, or the window was asked for it last.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn set(&mut self, window: &Window, cluster: u64, value: u32) -> DriverResult<()> {
        let at = Header::entry_place(cluster);
        let start = usize::try_from(at % SECTOR).map_err(|_| overflow("a place in the BAT"))?;
        let fresh = || Sector { bytes: window.sector(at), changed: (start, start) };
        let sector = self.sectors.entry(at - at % SECTOR).or_insert_with(fresh);
        let place = sector.bytes.get_mut(start..start + ENTRY).ok_or_else(|| overflow("a place in the BAT"))?;
        place.copy_from_slice(&value.to_le_bytes());
        sector.changed = (sector.changed.0.min(start), sector.changed.1.max(start + ENTRY));
        Ok(())
    }

    /// Whether a sector is held in which any of these entries stands.
    pub fn touch(&self, clusters: &Range<u64>) -> bool {
        let at = Header::entry_place(clusters.start);
        let range = at - at % SECTOR..Header::entry_place(clusters.end);
        range.start < range.end && self.sectors.range(range).next().is_some()
    }

    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Whether changed entries have to be written before others are changed.
    pub fn is_full(&self) -> bool {
        self.sectors.len() >= MOST
    }

    /// Write the changed entries, those that follow each other at once. An entry lies within a sector, so that each of them is
    /// there or not after a crash.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (start, sector) in core::mem::take(&mut self.sectors) {
            let (from, to) = sector.changed;
            let at = start + from as u64;
            let bytes = sector.bytes.get(from..to).unwrap_or_default();
            match runs.last_mut() {
                Some((begin, run)) if *begin + run.len() as u64 == at => run.extend(bytes),
                _ => runs.push((at, bytes.to_vec())),
            }
        }
        let write =
            |(at, run): &(u64, Vec<u8>)| Request::write(out.device(), *at, run.as_ptr() as u64, run.len() as u64);
        let mut requests: Vec<Request> = runs.iter().map(write).collect();
        out.run(io, &mut requests)
    }
}
