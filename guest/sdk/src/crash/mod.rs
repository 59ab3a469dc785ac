//! The states that a power loss can leave, for tests of drivers: replays of the changes that [`MemoryDevices`] have recorded.
//!
//! Changes before the last flush of their device are on the disk. Of the changes after it, any subset may be: all of them,
//! one alone, all but one, and of each write any of its sectors.
//!
//! If there are few changes between two flushes, the replay tries all subsets, otherwise random ones. The environment says how
//! many are few: with `INSTAR_EVERY_STATE=14`, up to 14 sectors or writes; without it, up to 6.
//!
//! [`MemoryDevices`]: crate::memory::MemoryDevices

mod campaign;
mod disks;
mod pieces;

use crate::memory::Change;
use crate::random::Random;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use campaign::Campaign;
use disks::{Disks, Sum};
use pieces::{torn, Piece, Pieces};

/// Content of the devices by number.
pub type Files = BTreeMap<u32, Vec<u8>>;

/// Unflushed changes, the latest, each of which is tried alone, and left out.
const SINGLE: usize = 24;
/// In one of this many states, a second power loss is tried in the run that follows, until as many as are wanted were tried.
const SECOND: usize = 4;

/// The choice of states to replay after each recorded change.
#[derive(Clone, Copy, Debug)]
pub struct Crashes {
    /// Number of random subsets of the unflushed changes, and of random subsets of their sectors.
    pub drawn: usize,
    /// Seed of the random subsets.
    pub seed: u64,
}

/// What was looked at so far.
#[derive(Default)]
struct Seen {
    states: BTreeSet<Sum>,
    campaign: Campaign,
}

impl Crashes {
    /// Pass each different state to `verify` once, and return their number. `before` is the content of the devices before the
    /// first change of `log`.
    pub fn each(self, before: &Files, log: &[Change], verify: &mut dyn FnMut(Files)) -> usize {
        self.each_again(before, log, &mut |files| {
            verify(files);
            Vec::new()
        })
    }

    /// Do the same as [`Crashes::each`] for a `verify` that runs the operation again and returns the changes of that run. Some
    /// of these runs lose power, too, and `verify` also gets the states that this leaves. It gets no state twice, whichever run
    /// has left it.
    pub fn each_again(self, before: &Files, log: &[Change], verify: &mut dyn FnMut(Files) -> Vec<Change>) -> usize {
        let mut seen = Seen { campaign: Campaign::from_environment(), ..Seen::default() };
        let most = seen.campaign.second_runs();
        let mut seconds: Vec<(Files, Vec<Change>)> = Vec::new();
        let (mut number, mut step) = (0, SECOND);
        self.replay(before, log, &mut seen, &mut |files| {
            number += 1;
            // The first state is that of before, which no power loss leaves.
            let kept = (number % step == 0 && most > 0).then(|| files.clone());
            let second = verify(files);
            seconds.extend(kept.filter(|_| !second.is_empty()).map(|files| (files, second)));
            if seconds.len() > most {
                // How many states there are is not known before: these are spread over all of them.
                let mut is_odd = false;
                seconds.retain(|_| {
                    is_odd = !is_odd;
                    !is_odd
                });
                step *= 2;
            }
        });
        seen.campaign.begin_second();
        for (files, second) in seconds {
            self.replay(&files, &second, &mut seen, &mut |files| drop(verify(files)));
        }
        seen.campaign.record(&seen.states);
        seen.states.len()
    }

    /// The states of one run.
    fn replay(self, before: &Files, log: &[Change], seen: &mut Seen, verify: &mut dyn FnMut(Files)) {
        let mut random = Random::seeded(self.seed);
        let mut disks = Disks::new(before);
        let mut unflushed: Vec<&Change> = Vec::new();
        for last in core::iter::once(None).chain(log.iter().map(Some)) {
            match last {
                Some(Change::Flush { device }) => {
                    // What it makes durable can be lost until here, and nothing of it from here on.
                    self.every_subset(&mut disks, &unflushed, seen, verify);
                    let (flushed, left) = unflushed.iter().partition(|change| change.device() == *device);
                    unflushed = left;
                    disks.flush(&flushed);
                }
                Some(change) => unflushed.push(change),
                None => {}
            }
            if seen.campaign.is_thorough() {
                self.after_a_change(&mut disks, &unflushed, &mut random, &mut seen.states, verify);
            }
        }
        self.every_subset(&mut disks, &unflushed, seen, verify);
    }

    /// All of the unflushed changes, each alone, all but each, and random ones.
    fn after_a_change(
        self,
        disks: &mut Disks,
        unflushed: &[&Change],
        random: &mut Random,
        seen: &mut BTreeSet<Sum>,
        verify: &mut dyn FnMut(Files),
    ) {
        let mut state = |pieces: &mut dyn Iterator<Item = Piece<'_>>| disks.state(pieces, seen, verify);
        let all = || unflushed.iter().enumerate().filter_map(|(index, change)| Some((index, Piece::of(change)?)));
        state(&mut all().map(|(_, piece)| piece));
        for one in (0..unflushed.len()).rev().take(SINGLE) {
            state(&mut all().filter(|(index, _)| *index == one).map(|(_, piece)| piece));
            state(&mut all().filter(|(index, _)| *index != one).map(|(_, piece)| piece));
        }
        for _ in 0..if unflushed.is_empty() { 0 } else { self.drawn } {
            state(&mut all().filter(|_| random.coin()).map(|(_, piece)| piece));
            state(&mut all().flat_map(|(_, piece)| torn(piece)).filter(|_| random.coin()));
        }
    }

    /// All subsets of the unflushed changes, if they are few.
    fn every_subset(self, disks: &mut Disks, unflushed: &[&Change], seen: &mut Seen, verify: &mut dyn FnMut(Files)) {
        if unflushed.is_empty() {
            return;
        }
        let pieces = Pieces::of(unflushed, disks.durable(), seen.campaign.most(disks.bytes()));
        seen.campaign.count(pieces.as_ref());
        let Some(Pieces { pieces, .. }) = pieces else { return };
        for subset in 0..1_u64 << pieces.len() {
            let chosen = pieces.iter().enumerate().filter(|(index, _)| subset >> index & 1 == 1);
            disks.state(&mut chosen.map(|(_, piece)| *piece), &mut seen.states, verify);
        }
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

    #[test]
    fn every_subset_of_few_changes_is_looked_at_without_drawing_any() {
        // Two sectors, one more, and a new length: four pieces, of which the length makes a difference to all.
        let log = [write(1, 0, 1, 1024), write(1, 1024, 2, 512), Change::SetLength { device: 1, length: 4096 }];
        let before = Files::from([(1, vec![0; 2048])]);
        let mut seen = BTreeSet::new();
        let count = Crashes { drawn: 0, seed: 1 }.each(&before, &log, &mut |files| {
            let file = &files[&1];
            seen.insert((file[0], file[512], file[1024], file.len()));
        });
        assert_eq!((seen.len(), count), (16, 16));
        // Three of two writes to one place: only what is written last shows.
        let log = [write(1, 0, 1, 512), write(1, 0, 2, 512), Change::Flush { device: 1 }, write(1, 0, 1, 512)];
        assert_eq!(Crashes { drawn: 0, seed: 1 }.each(&before, &log, &mut |_| ()), 3);
    }

    #[test]
    fn what_a_cut_and_a_later_write_leave_is_told_apart() {
        let log = [Change::SetLength { device: 1, length: 700 }, write(1, 2048, 5, 100)];
        let before = Files::from([(1, vec![9; 2048])]);
        let mut seen = BTreeSet::new();
        Crashes { drawn: 0, seed: 1 }.each(&before, &log, &mut |files| {
            seen.insert(files[&1].clone());
        });
        let extended = |mut bytes: Vec<u8>| {
            bytes.resize(2048, 0);
            bytes.extend([5; 100]);
            bytes
        };
        let cut = vec![9; 700];
        assert_eq!(seen, BTreeSet::from([vec![9; 2048], cut.clone(), extended(vec![9; 2048]), extended(cut)]));
    }

    #[test]
    fn a_second_run_loses_power_too() {
        let log: Vec<Change> = (0..4).map(|at| write(1, at * 512, 1, 512)).collect();
        let before = Files::from([(1, vec![0; 2048])]);
        let mut marked = 0;
        // What runs again writes a mark, which no state of the first run has.
        let count = Crashes { drawn: 0, seed: 1 }.each_again(&before, &log, &mut |files| {
            marked += usize::from(files[&1][0] == 2);
            vec![write(1, 0, 2, 512)]
        });
        assert_eq!(count, 16 + marked);
        assert!(marked > 0);
    }
}
