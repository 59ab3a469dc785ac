//! What is done about a block that data or zeroes arrive for.

use instar_guest_sdk::table::Arrival;
use instar_vdi_format::Entry;

/// What is done about a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It reads as it should already.
    Nothing,
    /// Written where it is. That holds for zeroes, too: a block that gave its slot up would leave a gap in the data area,
    /// where other programs go by the number of blocks.
    InPlace(u32),
    /// A new slot; what is around the new data is filled up.
    Allocate,
    /// Its entry says zeroes.
    MarkZero,
}

/// Decide. `below`: something may show through where the image has nothing.
pub fn decide(entry: Entry, arrival: Arrival, below: bool) -> Action {
    match (entry, arrival.zero) {
        (Entry::Slot(slot), _) => Action::InPlace(slot),
        (Entry::Zero, true) => Action::Nothing,
        (Entry::Free, true) if !below => Action::Nothing,
        (Entry::Free, true) if arrival.whole => Action::MarkZero,
        (Entry::Free | Entry::Zero, _) => Action::Allocate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        for whole in [false, true] {
            for below in [false, true] {
                let (data, zero) = (Arrival { zero: false, whole }, Arrival { zero: true, whole });
                for arrival in [data, zero] {
                    assert_eq!(decide(Entry::Slot(7), arrival, below), Action::InPlace(7));
                }
                assert_eq!(decide(Entry::Zero, data, below), Action::Allocate);
                assert_eq!(decide(Entry::Free, data, below), Action::Allocate);
                assert_eq!(decide(Entry::Zero, zero, below), Action::Nothing);
                let free = match (below, whole) {
                    (false, _) => Action::Nothing,
                    (true, true) => Action::MarkZero,
                    (true, false) => Action::Allocate,
                };
                assert_eq!(decide(Entry::Free, zero, below), free);
            }
        }
    }
}
