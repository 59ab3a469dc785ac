//! The parts of a disk that are compressed and do not decode.

use alloc::collections::BTreeMap;

/// Parts that are told one by one. What else there is counts as one of several.
pub const MOST: usize = 64;

/// The parts of a disk that do not decode: with the byte at which each begins, where it ends.
#[derive(Debug, Default)]
pub struct Salvaged {
    parts: BTreeMap<u64, u64>,
    /// Where the first of those begins for which there was no room, and the bytes of all of them.
    rest: Option<(u64, u64)>,
}

impl Salvaged {
    /// Add `length` bytes from byte `from` of the disk on. What was read before, counts once.
    pub fn add(&mut self, from: u64, length: u64) {
        let end = from.saturating_add(length);
        if let Some((_, last)) = self.parts.range_mut(..=from).next_back().filter(|(_, last)| **last >= from) {
            *last = end.max(*last);
        } else if self.parts.len() < MOST {
            self.parts.insert(from, end);
        } else {
            let (first, bytes) = self.rest.unwrap_or((from, 0));
            self.rest = Some((first.min(from), bytes.saturating_add(length)));
        }
    }

    /// The parts, ascending: where each begins, its bytes, and whether it stands for several.
    pub fn parts(&self) -> impl Iterator<Item = (u64, u64, bool)> + '_ {
        let parts = self.parts.iter().map(|(from, end)| (*from, end - from, false));
        parts.chain(self.rest.map(|(from, bytes)| (from, bytes, true)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    #[test]
    fn neighbors_are_one_part_and_there_are_not_too_many() {
        let mut salvaged = Salvaged::default();
        for from in [65536, 0, 4096, 65536] {
            salvaged.add(from, 4096);
        }
        assert_eq!(salvaged.parts().collect::<Vec<_>>(), vec![(0, 8192, false), (65536, 4096, false)]);
        for part in 0..MOST as u64 {
            salvaged.add((part + 100) << 20, 512);
        }
        let parts: Vec<_> = salvaged.parts().collect();
        assert_eq!((parts.len(), parts[MOST]), (MOST + 1, (162 << 20, 1024, true)));
    }
}
