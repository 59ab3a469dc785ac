//! The states that a power loss can leave, for tests of drivers: what was recorded by [`MemoryDevices`] is replayed.
//!
//! What was written before the last flush of its device is on the disk. Of what was written after it, anything may be: all
//! of it, one change alone, all but one, any subset, and of each write any of its sectors.
//!
//! [`MemoryDevices`]: crate::memory::MemoryDevices

use crate::memory::Change;
use crate::random::Random;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// Content of the devices by number.
pub type Files = BTreeMap<u32, Vec<u8>>;

/// Unflushed changes, the latest, each of which is tried alone, and left out.
const SINGLE: usize = 24;
/// What a disk writes at once, in bytes.
const SECTOR: u64 = 512;

/// Which states are looked at.
#[derive(Clone, Copy, Debug)]
pub struct Crashes {
    /// Random subsets of the unflushed changes, and as many of their sectors, after each change.
    pub drawn: usize,
    /// What the random ones follow from.
    pub seed: u64,
}

impl Crashes {
    /// Hand every state to `verify`, once; returns how many different ones there were. `before` is what the devices held
    /// before the first change of `log`.
    pub fn each(self, before: &Files, log: &[Change], verify: &mut dyn FnMut(Files)) -> usize {
        let mut random = Random::seeded(self.seed);
        let mut coin = move || random.coin();
        // The same state is left in many ways: by any subset of changes that were flushed since, for one.
        let mut seen = BTreeSet::new();
        for end in 0..=log.len() {
            let done = log.get(..end).unwrap_or_default();
            let mut durable = before.clone();
            let mut unflushed: Vec<&Change> = Vec::new();
            for (index, change) in done.iter().enumerate() {
                let device = change.device();
                if done.iter().skip(index).any(|later| *later == Change::Flush { device }) {
                    change.apply(&mut durable);
                } else {
                    unflushed.push(change);
                }
            }
            let mut state = |chosen: &mut dyn FnMut(usize) -> bool, torn: Option<&mut dyn FnMut() -> bool>| {
                let mut files = durable.clone();
                let chosen =
                    unflushed.iter().enumerate().filter(|(index, _)| chosen(*index)).map(|(_, change)| *change);
                match torn {
                    None => chosen.for_each(|change| change.apply(&mut files)),
                    Some(coin) => chosen.for_each(|change| tear(change, coin, &mut files)),
                }
                if seen.insert(fingerprint(&files)) {
                    verify(files);
                }
            };
            state(&mut |_| true, None);
            for one in (0..unflushed.len()).rev().take(SINGLE) {
                state(&mut |index| index == one, None);
                state(&mut |index| index != one, None);
            }
            for _ in 0..if unflushed.is_empty() { 0 } else { self.drawn } {
                state(&mut |_| coin(), None);
                state(&mut |_| true, Some(&mut coin));
            }
        }
        seen.len()
    }
}

/// What tells one state from another: two sums of 64 bits, so that none is passed over by chance.
fn fingerprint(files: &Files) -> [u64; 2] {
    /// Odd constants without a pattern: the digits of the golden ratio and of pi.
    const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0x2436_a885_a308_d313 | 1];
    let mut sums = [0u64; 2];
    let mut add = |word: u64| {
        for (sum, factor) in sums.iter_mut().zip(FACTORS) {
            *sum = (sum.rotate_left(29) ^ word).wrapping_mul(factor);
        }
    };
    for (device, bytes) in files {
        add(u64::from(*device));
        add(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| add(u64::from_le_bytes(*word)));
        rest.iter().for_each(|byte| add(u64::from(*byte)));
    }
    sums
}

/// Apply some of a change: any of its sectors.
fn tear(change: &Change, coin: &mut dyn FnMut() -> bool, files: &mut Files) {
    let Change::Write { device, offset, bytes } = change else {
        if coin() {
            change.apply(files);
        }
        return;
    };
    let mut rest = bytes.as_slice();
    let mut at = *offset;
    while !rest.is_empty() {
        let room = usize::try_from(SECTOR - at % SECTOR).unwrap_or(usize::MAX);
        let (sector, after) = rest.split_at(room.min(rest.len()));
        if coin() {
            Change::Write { device: *device, offset: at, bytes: sector.to_vec() }.apply(files);
        }
        at = at.saturating_add(sector.len() as u64);
        rest = after;
    }
}
