//! What is on the disks, and one state after the other that they may be found in.
//!
//! A state differs from what is durable in a few sectors. Only these are written, summed up and put back, so that thousands of
//! states of an image cost little more than what they differ in.

use super::pieces::{Piece, What, SECTOR};
use super::Files;
use crate::memory::Change;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// What tells one content from another: two sums of 64 bits, so that none is passed over by chance.
pub(super) type Sum = [u64; 2];

/// Odd constants without a pattern: the digits of the golden ratio and of pi.
const FACTORS: Sum = [0x9e37_79b9_7f4a_7c15, 0x2436_a885_a308_d313 | 1];

fn add(sums: &mut Sum, word: u64) {
    for (sum, factor) in sums.iter_mut().zip(FACTORS) {
        *sum = (sum.rotate_left(29) ^ word).wrapping_mul(factor);
    }
}

fn toggle(sums: &mut Sum, other: Sum) {
    sums.iter_mut().zip(other).for_each(|(sum, other)| *sum ^= other);
}

/// The sum of a sector, as if the file went on with zeroes: one of zeroes has none, so that a file that gets longer has new
/// sectors where something is written, and only there.
fn sector_sum(file: &[u8], sector: usize) -> Sum {
    let start = sector.saturating_mul(SECTOR).min(file.len());
    let bytes = &file[start..start.saturating_add(SECTOR).min(file.len())];
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    if end == 0 {
        return [0; 2];
    }
    let mut sums = [0; 2];
    add(&mut sums, sector as u64);
    for chunk in bytes[..end].chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        add(&mut sums, u64::from_le_bytes(word));
    }
    // The factors move bits up, and never down.
    sums.map(|sum| sum ^ sum >> 32)
}

fn file_sum(file: &[u8]) -> Sum {
    let mut sums = [0; 2];
    (0..file.len().div_ceil(SECTOR)).for_each(|sector| toggle(&mut sums, sector_sum(file, sector)));
    sums
}

/// The disks.
pub(super) struct Disks {
    /// What is on them whatever becomes of the changes since.
    durable: Files,
    /// The same, but for the sectors and lengths of the state that is being made.
    work: Files,
    /// The sums of all sectors of each durable file.
    sums: BTreeMap<u32, Sum>,
    /// The sums of durable sectors that have been asked for since the last flush.
    known: BTreeMap<(u32, usize), Sum>,
}

/// Sectors in which a state differs from what is durable.
type Touched = BTreeSet<(u32, usize)>;

impl Disks {
    pub(super) fn new(files: &Files) -> Self {
        let sums = files.iter().map(|(device, bytes)| (*device, file_sum(bytes))).collect();
        Self { durable: files.clone(), work: files.clone(), sums, known: BTreeMap::new() }
    }

    /// What no power loss takes back.
    pub(super) fn durable(&self) -> &Files {
        &self.durable
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> usize {
        self.durable.values().map(Vec::len).sum()
    }

    /// These changes can be lost no more.
    pub(super) fn flush(&mut self, changes: &[&Change]) {
        let touched = self.apply(&mut changes.iter().filter_map(|change| Piece::of(change)));
        let changed: BTreeSet<u32> = changes.iter().map(|change| change.device()).collect();
        for (device, sum) in self.changed_sums(&touched) {
            self.sums.insert(device, sum);
        }
        for device in changed {
            let work = self.work.get(&device).map(Vec::as_slice).unwrap_or_default();
            let file = self.durable.entry(device).or_default();
            file.resize(work.len(), 0);
            copy_sectors(&touched, device, work, file);
        }
        self.known.clear();
    }

    /// Hand the state with these pieces to `verify`, unless it has been seen.
    pub(super) fn state(
        &mut self,
        pieces: &mut dyn Iterator<Item = Piece<'_>>,
        seen: &mut BTreeSet<Sum>,
        verify: &mut dyn FnMut(Files),
    ) {
        let touched = self.apply(pieces);
        if seen.insert(self.sum(&touched)) {
            verify(self.work.clone());
        }
        self.restore(&touched);
    }

    /// Make these changes to `work`, and return which sectors may have another content than before.
    fn apply(&mut self, pieces: &mut dyn Iterator<Item = Piece<'_>>) -> Touched {
        let mut touched = Touched::new();
        for piece in pieces {
            match piece.what {
                What::Bytes { offset, bytes } => {
                    let end = offset.saturating_add(bytes.len());
                    touched.extend((offset / SECTOR..end.div_ceil(SECTOR)).map(|sector| (piece.device, sector)));
                }
                What::Length(length) => {
                    let end = self.work.get(&piece.device).map_or(0, Vec::len);
                    touched.extend((length / SECTOR..end.div_ceil(SECTOR)).map(|sector| (piece.device, sector)));
                }
            }
            piece.apply(&mut self.work);
        }
        touched
    }

    /// Take back what [`Disks::apply`] did.
    fn restore(&mut self, touched: &Touched) {
        let durable = &self.durable;
        self.work.retain(|device, _| durable.contains_key(device));
        for (device, file) in &mut self.work {
            let Some(was) = durable.get(device) else { continue };
            // A file that became longer has no other sectors than those it had, and those that are touched.
            file.resize(was.len(), 0);
            copy_sectors(touched, *device, was, file);
        }
    }

    /// The sums of the files of which sectors are touched.
    fn changed_sums(&mut self, touched: &Touched) -> BTreeMap<u32, Sum> {
        let mut changed = BTreeMap::new();
        for &(device, sector) in touched {
            let durable = &self.durable;
            let was = self
                .known
                .entry((device, sector))
                .or_insert_with(|| sector_sum(durable.get(&device).map(Vec::as_slice).unwrap_or_default(), sector));
            let now = self.work.get(&device).map_or([0; 2], |file| sector_sum(file, sector));
            let sum = changed.entry(device).or_insert_with(|| self.sums.get(&device).copied().unwrap_or_default());
            toggle(sum, *was);
            toggle(sum, now);
        }
        changed
    }

    /// What tells the content of all devices from another.
    fn sum(&mut self, touched: &Touched) -> Sum {
        let changed = self.changed_sums(touched);
        let mut all = [0; 2];
        for (device, file) in &self.work {
            let sums = changed.get(device).or_else(|| self.sums.get(device)).copied().unwrap_or_default();
            add(&mut all, u64::from(*device));
            add(&mut all, file.len() as u64);
            for (all, (sum, factor)) in all.iter_mut().zip(sums.into_iter().zip(FACTORS)) {
                *all = (all.rotate_left(29) ^ sum).wrapping_mul(factor);
            }
        }
        all
    }
}

/// Copy the touched sectors of a device, as far as both files go.
fn copy_sectors(touched: &Touched, device: u32, from: &[u8], to: &mut [u8]) {
    let length = from.len().min(to.len());
    for (_, sector) in touched.range((device, 0)..=(device, usize::MAX)) {
        let start = sector.saturating_mul(SECTOR).min(length);
        let end = start.saturating_add(SECTOR).min(length);
        to[start..end].copy_from_slice(&from[start..end]);
    }
}
