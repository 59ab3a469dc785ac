//! The decision how a sink stores the data or zeroes that arrive for a cluster.

use super::Arrival;

/// The present state of a cluster in an image. `P` is a place in the file, in the format's own unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held<P> {
    /// Not held: the image below shows through.
    Nothing,
    /// Zeroes, which take no space.
    Zero,
    /// Stored at this place.
    At(P),
}

/// The clusters whose entry can be changed to one that says zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroEntries {
    /// None: the format, or this image, has no such entry.
    Never,
    /// Clusters that the image does not hold. Others would leave a gap where they were stored.
    WhereNothingIs,
    /// All clusters. The place of a cluster becomes free.
    Anywhere,
}

/// The action by which a sink stores the data or zeroes for a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<P> {
    /// Do nothing: the cluster already reads as it should.
    Nothing,
    /// Write in place.
    InPlace(P),
    /// Allocate a new cluster. Fill it around the new data with the bytes that a guest read there before: those from below if
    /// the image [did not hold](Held::Nothing) the cluster, otherwise zeroes.
    Allocate,
    /// Make the entry say zeroes, and give back the place of the cluster, if it had one.
    MarkZero(Option<P>),
}

impl<P> From<Option<P>> for Held<P> {
    fn from(place: Option<P>) -> Self {
        place.map_or(Self::Nothing, Self::At)
    }
}

impl<P> Held<P> {
    /// Choose the action for `arrival`. `below` says whether an image below may show through where this one holds nothing.
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
