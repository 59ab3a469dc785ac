//! What is done about a grain that data or zeroes arrive for.

use instar_guest_sdk::table::Arrival;
use instar_vmdk_format::Grain;

/// What is done about a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It reads as it should already.
    Nothing,
    /// Written where it is: at this byte of the file.
    InPlace(u64),
    /// A new grain at the end of the file; what is around the new data is filled up.
    Allocate,
    /// Its entry says zeroes; the grain that it had is given back.
    MarkZero(Option<u64>),
}

/// Decide. `zeroed_grains`: entries may say zeroes; `below`: something may show through where the image has nothing.
pub fn decide(grain: Grain, arrival: Arrival, zeroed_grains: bool, below: bool) -> Action {
    let markable = arrival.whole && zeroed_grains;
    match (grain, arrival.zero) {
        (Grain::At(offset), true) if markable => Action::MarkZero(Some(offset)),
        (Grain::At(offset), _) => Action::InPlace(offset),
        (Grain::Zero, true) => Action::Nothing,
        (Grain::Absent, true) if !below => Action::Nothing,
        (Grain::Absent, true) if markable => Action::MarkZero(None),
        (Grain::Absent | Grain::Zero, _) => Action::Allocate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        let (data, zero) = (Arrival { zero: false, whole: true }, Arrival { zero: true, whole: true });
        let part = Arrival { zero: true, whole: false };
        for below in [false, true] {
            for marks in [false, true] {
                assert_eq!(decide(Grain::At(512), data, marks, below), Action::InPlace(512));
                assert_eq!(decide(Grain::Absent, data, marks, below), Action::Allocate);
                assert_eq!(decide(Grain::Zero, data, marks, below), Action::Allocate);
                assert_eq!(decide(Grain::At(512), part, marks, below), Action::InPlace(512));
                assert_eq!(decide(Grain::Zero, part, marks, below), Action::Nothing);
            }
            assert_eq!(decide(Grain::At(512), zero, true, below), Action::MarkZero(Some(512)));
            assert_eq!(decide(Grain::At(512), zero, false, below), Action::InPlace(512));
        }
        assert_eq!(decide(Grain::Absent, zero, true, true), Action::MarkZero(None));
        assert_eq!(decide(Grain::Absent, zero, false, true), Action::Allocate);
        assert_eq!(decide(Grain::Absent, part, true, true), Action::Allocate);
        assert_eq!(decide(Grain::Absent, zero, true, false), Action::Nothing);
    }
}
