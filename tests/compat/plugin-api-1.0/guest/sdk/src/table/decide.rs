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
