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
