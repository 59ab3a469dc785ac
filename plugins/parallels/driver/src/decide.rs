//! What is done about a cluster that data or zeroes arrive for.

use instar_guest_sdk::table::Arrival;

/// What is done about a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It reads as it should already.
    Nothing,
    /// Written where it is, at this byte of the file. That holds for zeroes, too, for which the format has no entry.
    InPlace(u64),
    /// A new cluster; what is around the new data comes from below.
    Allocate,
}

/// Decide about a cluster that lies at byte `place` of the file, if the image holds it. `below`: something may show through
/// where the image has nothing.
pub fn decide(place: Option<u64>, arrival: Arrival, below: bool) -> Action {
    match place {
        Some(offset) => Action::InPlace(offset),
        None if arrival.zero && !below => Action::Nothing,
        None => Action::Allocate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        for (zero, whole, below) in (0..8).map(|bits| (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0)) {
            assert_eq!(decide(Some(512), Arrival { zero, whole }, below), Action::InPlace(512));
            let free = if zero && !below { Action::Nothing } else { Action::Allocate };
            assert_eq!(decide(None, Arrival { zero, whole }, below), free);
        }
    }
}
