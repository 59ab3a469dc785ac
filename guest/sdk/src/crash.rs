//! The states that a power loss can leave, for tests of drivers, which replay the log of [`MemoryDevices`].
//!
//! Every change before the last flush of its device is on the disk. Of the later ones, any subset may be, and of each write any
//! of its sectors.
//!
//! [`MemoryDevices`]: crate::memory::MemoryDevices

use crate::memory::Change;
use crate::random::Random;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// Content of the devices by number.
pub type Files = BTreeMap<u32, Vec<u8>>;

/// Number of the latest unflushed changes of which each is applied alone, and left out alone.
const SINGLE: usize = 24;
/// Size in bytes of an atomic write of a disk.
const SECTOR: u64 = 512;

/// The selection of states to examine.
#[derive(Clone, Copy, Debug)]
pub struct Crashes {
    /// Number of random subsets of the unflushed changes after each change, and of random subsets of their sectors.
    pub drawn: usize,
    /// Seed of the random subsets.
    pub seed: u64,
}

impl Crashes {
    /// Pass every distinct state to `verify`, once, and return their number. `before` is the content of the devices before the
    /// first change of `log`.
    pub fn each(self, before: &Files, log: &[Change], verify: &mut dyn FnMut(Files)) -> usize {
        let mut random = Random::seeded(self.seed);
        let mut coin = move || random.coin();
        // The same state is left in many ways: by any subset of changes that were flushed since, for one.
        let mut seen = BTreeSet::new();
        let mut durable = Durable::new(before);
        let mut unflushed: Vec<&Change> = Vec::new();
        for last in core::iter::once(None).chain(log.iter().map(Some)) {
            match last {
                Some(Change::Flush { device }) => {
                    let (flushed, left) = unflushed.iter().partition(|change| change.device() == *device);
                    unflushed = left;
                    durable.flush(*device, flushed);
                }
                Some(change) => unflushed.push(change),
                None => {}
            }
            let mut state = |chosen: &mut dyn FnMut(usize) -> bool, torn: Option<&mut dyn FnMut() -> bool>| {
                let chosen =
                    unflushed.iter().enumerate().filter(|(index, _)| chosen(*index)).map(|(_, change)| *change);
                let mut changed = Files::new();
                let mut apply = |change: &Change, apply: &mut dyn FnMut(&mut Files)| {
                    let device = change.device();
                    if let (false, Some(bytes)) = (changed.contains_key(&device), durable.files.get(&device)) {
                        changed.insert(device, bytes.clone());
                    }
                    apply(&mut changed);
                };
                match torn {
                    None => chosen.for_each(|change| apply(change, &mut |files| change.apply(files))),
                    Some(coin) => chosen.for_each(|change| apply(change, &mut |files| tear(change, coin, files))),
                }
                if seen.insert(durable.sum_with(&changed)) {
                    verify(durable.files_with(changed));
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

/// What is on the disks whatever becomes of the changes since. Images of many MiB are copied, and summed up, no more often than
/// they change.
struct Durable {
    files: Files,
    /// What tells the content of each device from another.
    sums: BTreeMap<u32, [u64; 2]>,
}

impl Durable {
    fn new(files: &Files) -> Self {
        Self { files: files.clone(), sums: files.iter().map(|(device, bytes)| (*device, fingerprint(bytes))).collect() }
    }

    /// All that was changed on a device before it was flushed.
    fn flush(&mut self, device: u32, changes: Vec<&Change>) {
        changes.iter().for_each(|change| change.apply(&mut self.files));
        if let (false, Some(bytes)) = (changes.is_empty(), self.files.get(&device)) {
            self.sums.insert(device, fingerprint(bytes));
        }
    }

    /// What tells the content of all devices from another, if some have changed.
    fn sum_with(&self, changed: &Files) -> [u64; 2] {
        let mut all = [0u64; 2];
        let known =
            self.sums.iter().map(|(device, sums)| changed.get(device).map_or(*sums, |bytes| fingerprint(bytes)));
        let new = changed.iter().filter(|(device, _)| !self.sums.contains_key(device));
        for sums in known.chain(new.map(|(_, bytes)| fingerprint(bytes))) {
            for (sum, one) in all.iter_mut().zip(sums) {
                *sum = (sum.rotate_left(29) ^ one).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            }
        }
        all
    }

    /// All devices, of which some have changed.
    fn files_with(&self, mut changed: Files) -> Files {
        for (device, bytes) in &self.files {
            if !changed.contains_key(device) {
                changed.insert(*device, bytes.clone());
            }
        }
        changed
    }
}

/// What tells one content from another: two sums of 64 bits, so that none is passed over by chance.
fn fingerprint(bytes: &[u8]) -> [u64; 2] {
    /// Odd constants without a pattern: the digits of the golden ratio and of pi.
    const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0x2436_a885_a308_d313 | 1];
    let mut sums = [0u64; 2];
    let mut add = |word: u64| {
        for (sum, factor) in sums.iter_mut().zip(FACTORS) {
            *sum = (sum.rotate_left(29) ^ word).wrapping_mul(factor);
        }
    };
    add(bytes.len() as u64);
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().for_each(|word| add(u64::from_le_bytes(*word)));
    rest.iter().for_each(|byte| add(u64::from(*byte)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn write(device: u32, offset: u64, byte: u8, length: usize) -> Change {
        Change::Write { device, offset, bytes: vec![byte; length] }
    }

    #[test]
    fn flushed_writes_are_in_every_state_after_them() {
        let log =
            [write(1, 0, 1, 4), Change::Flush { device: 1 }, write(1, 0, 2, 2), write(1, 2, 3, 2), write(2, 0, 9, 1)];
        let before = Files::from([(1, vec![0; 4]), (2, vec![0])]);
        let mut seen = BTreeSet::new();
        let count = Crashes { drawn: 8, seed: 5 }.each(&before, &log, &mut |files| {
            seen.insert((files[&1].clone(), files[&2].clone()));
        });
        let first = BTreeSet::from([vec![0; 4], vec![1; 4], vec![2, 2, 1, 1], vec![1, 1, 3, 3], vec![2, 2, 3, 3]]);
        assert_eq!(seen.iter().map(|(one, _)| one.clone()).collect::<BTreeSet<_>>(), first);
        // The other device is not held back by the flush of the first.
        assert!(seen.contains(&(vec![1; 4], vec![9])));
        assert_eq!(count, seen.len(), "a state is verified once, and none is passed over");
    }

    #[test]
    fn writes_are_torn_at_sectors() {
        let log = [write(1, 256, 7, 1024)];
        let mut seen = BTreeSet::new();
        Crashes { drawn: 100, seed: 1 }.each(&Files::from([(1, vec![0; 1280])]), &log, &mut |files| {
            let pieces = [256..512, 512..1024, 1024..1280].map(|range| {
                let bytes = &files[&1][range];
                assert!(bytes.iter().all(|byte| byte == &bytes[0]), "a sector is in two pieces");
                bytes[0] == 7
            });
            seen.insert(pieces);
        });
        assert_eq!(seen.len(), 8);
    }
}
