//! What is done about a cluster that data or zeroes arrive for.

use super::Arrival;

/// What an image holds of a cluster. `P` is a place, in whatever unit the format has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held<P> {
    /// Nothing: what is below shows.
    Nothing,
    /// Zeroes, which take no space.
    Zero,
    /// The cluster is here.
    At(P),
}

/// Which clusters can be given an entry that says zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroEntries {
    /// None: the format, or this image, has no such entry.
    Never,
    /// Those of which the image holds nothing: a cluster that gave its place up would leave a gap.
    WhereNothingIs,
    /// All; the place that a cluster had is free.
    Anywhere,
}

/// What is done about a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<P> {
    /// It reads as it should already.
    Nothing,
    /// Written where it is.
    InPlace(P),
    /// A new cluster; what is around the new data is what showed there: from below only if the image
    /// [held nothing](Held::Nothing), otherwise zeroes.
    Allocate,
    /// Its entry says zeroes; the place that it had, if any, is given back.
    MarkZero(Option<P>),
}

impl<P> From<Option<P>> for Held<P> {
    fn from(place: Option<P>) -> Self {
        place.map_or(Self::Nothing, Self::At)
    }
}

impl<P> Held<P> {
    /// Decide what is done when this arrives for a cluster. `below`: something may show through where the image holds nothing.
    #[must_use]
    pub fn decide(self, arrival: Arrival, zeroes: ZeroEntries, below: bool) -> Action<P> {
        let whole = arrival.zero && arrival.whole;
        match (self, arrival.zero) {
            (Self::At(place), _) if whole && zeroes == ZeroEntries::Anywhere => Action::MarkZero(Some(place)),
            (Self::At(place), _) => Action::InPlace(place),
            (Self::Zero, true) => Action::Nothing,
            (Self::Nothing, true) if !below => Action::Nothing,
            (Self::Nothing, _) if whole && zeroes != ZeroEntries::Never => Action::MarkZero(None),
            (Self::Nothing | Self::Zero, _) => Action::Allocate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ZeroEntries::{Anywhere, Never, WhereNothingIs};

    const DATA: Arrival = Arrival { zero: false, whole: true };
    const ZERO: Arrival = Arrival { zero: true, whole: true };
    const PART: Arrival = Arrival { zero: true, whole: false };

    #[test]
    fn data_goes_where_the_cluster_is_or_into_a_new_one() {
        for zeroes in [Never, WhereNothingIs, Anywhere] {
            for (below, whole) in [(false, false), (false, true), (true, false), (true, true)] {
                let decide = |held: Held<u32>| held.decide(Arrival { whole, ..DATA }, zeroes, below);
                let decided = [Held::from(Some(7)), Held::from(None), Held::Zero].map(decide);
                assert_eq!(decided, [Action::InPlace(7), Action::Allocate, Action::Allocate]);
            }
        }
    }

    #[test]
    fn zeroes_take_no_space_where_an_entry_can_say_so() {
        for (zeroes, arrival, below, at, nothing) in [
            (Never, ZERO, true, Action::InPlace(7), Action::Allocate),
            (Never, PART, true, Action::InPlace(7), Action::Allocate),
            (Never, ZERO, false, Action::InPlace(7), Action::Nothing),
            (Never, PART, false, Action::InPlace(7), Action::Nothing),
            (WhereNothingIs, ZERO, true, Action::InPlace(7), Action::MarkZero(None)),
            (WhereNothingIs, PART, true, Action::InPlace(7), Action::Allocate),
            (WhereNothingIs, ZERO, false, Action::InPlace(7), Action::Nothing),
            (WhereNothingIs, PART, false, Action::InPlace(7), Action::Nothing),
            (Anywhere, ZERO, true, Action::MarkZero(Some(7)), Action::MarkZero(None)),
            (Anywhere, PART, true, Action::InPlace(7), Action::Allocate),
            (Anywhere, ZERO, false, Action::MarkZero(Some(7)), Action::Nothing),
            (Anywhere, PART, false, Action::InPlace(7), Action::Nothing),
        ] {
            let decided = [Held::At(7), Held::Nothing, Held::Zero].map(|held| held.decide(arrival, zeroes, below));
            assert_eq!(decided, [at, nothing, Action::Nothing], "{zeroes:?} {arrival:?} {below}");
        }
    }
}
