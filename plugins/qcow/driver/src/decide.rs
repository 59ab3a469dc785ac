//! What is done about a cluster that data or zeroes arrive for.

use instar_guest_sdk::table::Arrival;
use instar_qcow_format::Entry;

/// What is done about a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It reads as it should already.
    Nothing,
    /// Written where it is, at this byte of the file. That holds for zeroes, too, for which the format has no entry.
    InPlace(u64),
    /// A new cluster; what is around the new data comes from below.
    Allocate,
    /// A new cluster instead of the stream of `length` bytes at this byte of the file, which others may share a sector with;
    /// what is around the new data is decoded from it.
    Unpack {
        /// Where the stream begins.
        offset: u64,
        /// Its bytes.
        length: u64,
    },
}

/// Decide. `below`: something may show through where the image has nothing.
pub fn decide(entry: Entry, arrival: Arrival, below: bool) -> Action {
    match entry {
        Entry::Data(offset) => Action::InPlace(offset),
        Entry::Free if arrival.zero && !below => Action::Nothing,
        Entry::Compressed { offset, length } if !arrival.whole => Action::Unpack { offset, length },
        Entry::Free | Entry::Compressed { .. } => Action::Allocate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        let (offset, length) = (700, 90);
        for (zero, whole, below) in (0..8).map(|bits| (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0)) {
            let arrival = Arrival { zero, whole };
            assert_eq!(decide(Entry::Data(512), arrival, below), Action::InPlace(512));
            let free = if zero && !below { Action::Nothing } else { Action::Allocate };
            assert_eq!(decide(Entry::Free, arrival, below), free);
            let packed = if whole { Action::Allocate } else { Action::Unpack { offset, length } };
            assert_eq!(decide(Entry::Compressed { offset, length }, arrival, below), packed);
        }
    }
}
