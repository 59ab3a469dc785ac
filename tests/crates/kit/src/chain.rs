//! Layers of drawn chains: what each format is asked for, and what an image of it may hold.

use instar_guest_sdk::random::Random;
use std::collections::BTreeMap;

/// An image of a drawn chain.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Bytes of the disk, whole sectors of 4 KiB.
    pub size: usize,
    /// Which image of the chain it is, 1 being the lowest: what its identity is made of.
    pub number: u8,
    /// Bytes of a sector of the whole chain, 512 or 4096, of formats that tell the guest.
    pub sector: usize,
    /// There is an image below. Its number is one less, and it is of the same format, unless the format
    /// [goes over any](crate::FormatKit::goes_over_any).
    pub has_parent: bool,
}

impl Place {
    /// What the identity of the parent is made of; `none` if there is no parent.
    #[must_use]
    pub fn parent(&self, none: u8) -> u8 {
        if self.has_parent {
            self.number - 1
        } else {
            none
        }
    }
}

/// Runs of units that an image is to hold, of a disk of so many: first, count, and a seed of their bytes. They may overlap, and
/// there may be none.
pub fn runs(random: &mut Random, units: usize) -> Vec<(usize, usize, u8)> {
    let lengths = [1, 1, 2, 7, 16, 64, 600, units];
    let run = |random: &mut Random| {
        let first = random.index(units);
        (first, (*random.pick(&lengths)).min(units - first).max(1), random.byte())
    };
    (0..random.index(7)).map(|_| run(random)).collect()
}

/// The same unit by unit, without those that another run covers.
pub fn units(random: &mut Random, units: usize) -> BTreeMap<usize, u8> {
    runs(random, units)
        .into_iter()
        .flat_map(|(first, count, seed)| (first..first + count).map(move |at| (at, seed)))
        .collect()
}
