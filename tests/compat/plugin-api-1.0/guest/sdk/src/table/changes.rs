//! Entries that are changed in memory, until what they name is durable.

use super::SECTOR;
use crate::error::{overflow, DriverResult};
use crate::io::BlockIo;
use crate::ordered::OrderedWriter;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use instar_guest_abi::Request;

/// Sectors that are held at most: 4 MiB.
const MOST: usize = 8192;

/// A sector of the file of which some entries differ from what is in it. Tables share no sector: what lies between two changed
/// entries belongs to the same table, and nobody else changes it, so that it may be written with them.
#[derive(Clone, Debug)]
struct Sector {
    bytes: Vec<u8>,
    /// Where the first of the changed entries begins, and where the last of them ends.
    changed: (usize, usize),
    /// The byte of the file up to which the table goes on, as far as is known.
    table_end: u64,
}

/// Changed entries, by the sectors in which they stand.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    sectors: BTreeMap<u64, Sector>,
}

/// The place of an entry of `length` bytes in its sector.
fn within(at: u64, length: usize) -> Option<core::ops::Range<usize>> {
    let start = usize::try_from(at % SECTOR).ok()?;
    Some(start..start.checked_add(length)?)
}

impl Changes {
    /// The `length` bytes at byte `at` of the file, which lie in one sector, if that is held.
    pub fn get(&self, at: u64, length: usize) -> Option<&[u8]> {
        self.sectors.get(&(at - at % SECTOR))?.bytes.get(within(at, length)?)
    }

    /// Change the bytes at byte `at` of the file, which lie in one sector, of a table that goes on up to byte `table_end`. `read`
    /// is asked for what is in that sector if it is not held.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn set(
        &mut self,
        (at, table_end): (u64, u64),
        bytes: &[u8],
        read: impl FnOnce() -> Vec<u8>,
    ) -> DriverResult<()> {
        let range = within(at, bytes.len()).ok_or_else(|| overflow("a place in a table"))?;
        let fresh = || Sector { bytes: read(), changed: (range.start, range.start), table_end };
        let sector = self.sectors.entry(at - at % SECTOR).or_insert_with(fresh);
        let place = sector.bytes.get_mut(range.clone()).ok_or_else(|| overflow("a place in a table"))?;
        place.copy_from_slice(bytes);
        sector.changed = (sector.changed.0.min(range.start), sector.changed.1.max(range.end));
        sector.table_end = sector.table_end.max(table_end);
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.sectors.len() >= MOST
    }

    /// The start of the first sector from byte `at` on that is held.
    pub fn next_from(&self, at: u64) -> Option<u64> {
        self.sectors.range(at..).next().map(|(start, _)| *start)
    }

    /// Write the changed entries in one batch. Those of a table in sectors that follow each other are written at once, with what
    /// lies between them. Nothing is held any more.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut before: Option<(u64, Sector)> = None;
        for (start, sector) in core::mem::take(&mut self.sectors) {
            let (from, to) = sector.changed;
            let at = start.saturating_add(from as u64);
            let goes_on =
                |(last, before): &(u64, Sector)| last.saturating_add(SECTOR) == start && before.table_end >= at;
            match (before.take().filter(goes_on), runs.last_mut()) {
                (Some((_, before)), Some((_, run))) => {
                    run.extend(before.bytes.get(before.changed.1..).unwrap_or_default());
                    run.extend(sector.bytes.get(..to).unwrap_or_default());
                }
                _ => runs.push((at, sector.bytes.get(from..to).unwrap_or_default().to_vec())),
            }
            before = Some((start, sector));
        }
        let write =
            |(at, run): &(u64, Vec<u8>)| Request::write(out.device(), *at, run.as_ptr() as u64, run.len() as u64);
        let mut requests: Vec<Request> = runs.iter().map(write).collect();
        out.run(io, &mut requests)
    }
}
