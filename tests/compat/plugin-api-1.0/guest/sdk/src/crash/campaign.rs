//! How many states are looked at, and what is told of them: the tests look at few of them, `make every-state` at a million.

extern crate std;

use super::disks::Sum;
use super::pieces::Pieces;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Pieces of which all subsets are looked at, if the environment does not say how many.
const FEW: usize = 6;
/// Second runs that are interrupted, too, of each run: in the tests, and in the campaign.
const SECOND_RUNS: [usize; 2] = [2, 16];
/// The most pieces of which all subsets are looked at.
const MOST: usize = 20;
/// Bytes of images that are small. Each doubling leaves one piece less, as each state takes twice as long.
const SMALL: usize = 1 << 20;

/// What is looked at.
#[derive(Default)]
pub(super) struct Campaign {
    /// Whether the environment says how much.
    is_long: bool,
    most: usize,
    /// Whether these are second runs.
    is_second: bool,
    /// Flushes before which all subsets of sectors were looked at, all subsets of writes, and only random ones.
    flushes: [usize; 3],
}

impl Campaign {
    /// What `INSTAR_EVERY_STATE` says: a number.
    pub(super) fn from_environment() -> Self {
        let said = std::env::var("INSTAR_EVERY_STATE").ok().and_then(|most| most.parse().ok());
        let most = said.map_or(FEW, |most: usize| most.min(MOST));
        Self { is_long: said.is_some(), most, ..Self::default() }
    }

    /// Second runs that are interrupted, too: none, if nobody wants subsets.
    pub(super) fn second_runs(&self) -> usize {
        if self.most == 0 {
            return 0;
        }
        SECOND_RUNS[usize::from(self.is_long)]
    }

    /// From here on, second runs are interrupted: half as many pieces, as there are many runs.
    pub(super) fn begin_second(&mut self) {
        self.most /= 2;
        self.is_second = true;
    }

    /// Whether states are looked at after each change, too, and not only before each flush: not of second runs in the tests.
    pub(super) fn is_thorough(&self) -> bool {
        self.is_long || !self.is_second
    }

    /// Pieces of which all subsets are looked at, in images of `bytes` bytes.
    pub(super) fn most(&self, bytes: usize) -> usize {
        let doublings = (bytes / SMALL).checked_ilog2().map_or(0, |doublings| doublings as usize + 1);
        self.most.saturating_sub(doublings)
    }

    /// A flush, and what is looked at of the changes in front of it.
    pub(super) fn count(&mut self, pieces: Option<&Pieces<'_>>) {
        let kind = pieces.map_or(2, |pieces| usize::from(!pieces.is_complete));
        self.flushes[kind] += 1;
    }

    /// Write down which states were looked at, into a file of its own in the folder that `INSTAR_EVERY_STATE_LOG` names, so that
    /// a campaign of many processes counts none twice: the numbers of flushes in a line, then 16 bytes for each state.
    ///
    /// # Panics
    /// If that folder cannot be written: a campaign that counts nothing has tried nothing.
    pub(super) fn record(&self, states: &BTreeSet<Sum>) {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let Some(folder) = std::env::var_os("INSTAR_EVERY_STATE_LOG") else { return };
        let name = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let [sectors, writes, drawn] = self.flushes;
        let mut bytes = Vec::from(format!("{sectors} {writes} {drawn}\n"));
        bytes.extend(states.iter().flatten().flat_map(|sum| sum.to_le_bytes()));
        let written = std::fs::write(std::path::Path::new(&folder).join(name), bytes);
        assert!(written.is_ok(), "INSTAR_EVERY_STATE_LOG cannot be written: {written:?}");
    }
}
