//! What can still be read of damaged images: sector by sector, and what cannot be read is said to be unreadable.

use crate::padded::copy_padded;

/// Bytes of a sector, the unit in which images are compared.
pub const SECTOR: usize = 512;
/// Bytes of the longest disk that is compared.
pub const LONGEST: u64 = 16 << 20;

/// What is known of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorState {
    /// The layer holds nothing here.
    Below,
    /// What it holds cannot be read.
    Unreadable,
    /// It holds these bytes.
    Held,
}

/// A disk, or what one layer holds of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Length in bytes.
    pub length: usize,
    /// By sector.
    pub states: Vec<SectorState>,
    /// By byte, in whole sectors; zeroes where nothing is held.
    pub bytes: Vec<u8>,
}

impl Disk {
    /// A disk of which nothing is held; `None` if it is longer than [`LONGEST`].
    #[must_use]
    pub fn new(length: u64) -> Option<Self> {
        let length = usize::try_from(length).ok().filter(|&length| length as u64 <= LONGEST)?;
        let sectors = length.div_ceil(SECTOR);
        Some(Self { length, states: vec![SectorState::Below; sectors], bytes: vec![0; sectors * SECTOR] })
    }

    /// Hold `length` bytes from byte `at` on, as far as the disk goes: `bytes`, then zeroes.
    pub fn hold(&mut self, at: usize, length: usize, bytes: &[u8]) {
        let end = at.saturating_add(length).min(self.bytes.len());
        if at < end {
            copy_padded(&mut self.bytes[at..end], bytes);
            self.states[at / SECTOR..end.div_ceil(SECTOR)].fill(SectorState::Held);
        }
    }

    /// Say that `length` bytes from byte `at` on cannot be read, as far as the disk goes.
    pub fn unreadable(&mut self, at: usize, length: usize) {
        let end = at.saturating_add(length).min(self.bytes.len());
        if at < end {
            self.states[at / SECTOR..end.div_ceil(SECTOR)].fill(SectorState::Unreadable);
        }
    }

    /// The bytes of a sector, if they can be read; fewer at the end of the disk.
    #[must_use]
    pub fn sector(&self, number: usize) -> Option<&[u8]> {
        let readable = self.states.get(number) == Some(&SectorState::Held);
        let end = (number * SECTOR + SECTOR).min(self.length);
        readable.then(|| &self.bytes[number * SECTOR..end])
    }
}

/// What a guest sees through these layers, the top-most first; `None` without a layer.
#[must_use]
pub fn seen(layers: &[&Disk]) -> Option<Disk> {
    let mut disk = Disk::clone(layers.first()?);
    for number in 0..disk.states.len() {
        let at = number * SECTOR;
        let mut state = SectorState::Held;
        let mut bytes = [0; SECTOR];
        for layer in layers {
            if at >= layer.length {
                break;
            }
            // A layer that ends within the sector hides a part of those below it.
            let cut = at + SECTOR > layer.length && layer.length != disk.length;
            state = if cut { SectorState::Unreadable } else { layer.states[number] };
            match state {
                SectorState::Below => state = SectorState::Held,
                SectorState::Held => {
                    bytes.copy_from_slice(&layer.bytes[at..at + SECTOR]);
                    break;
                }
                SectorState::Unreadable => break,
            }
        }
        disk.states[number] = state;
        disk.bytes[at..at + SECTOR].copy_from_slice(&bytes);
    }
    Some(disk)
}

/// What of a file lies at `at`: fewer bytes at its end.
#[must_use]
pub fn part(bytes: &[u8], at: u64, length: usize) -> &[u8] {
    let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
    &bytes[at..at.saturating_add(length).min(bytes.len())]
}

/// The little-endian number of `width` bytes at `at`; `None` past the end of the file.
#[must_use]
pub fn little(bytes: &[u8], at: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let raw = bytes.get(at..at.checked_add(width)?)?;
    Some(raw.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}
