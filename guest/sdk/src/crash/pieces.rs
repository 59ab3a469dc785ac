//! What a power loss keeps or loses as a whole: a sector of a write, a new length; and of the changes between two flushes, the
//! pieces of which all subsets are looked at.

use super::Files;
use crate::memory::Change;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// What a disk writes at once, in bytes.
pub(super) const SECTOR: usize = 512;

/// A change, or one sector of it.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) device: u32,
    pub(super) what: What<'a>,
}

/// What a piece does.
#[derive(Clone, Copy)]
pub(super) enum What<'a> {
    /// Bytes are written.
    Bytes { offset: usize, bytes: &'a [u8] },
    /// The length is set.
    Length(usize),
}

impl<'a> Piece<'a> {
    /// A whole change; `None` for a flush.
    pub(super) fn of(change: &'a Change) -> Option<Self> {
        let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        match change {
            Change::Write { device, offset, bytes } => {
                Some(Self { device: *device, what: What::Bytes { offset: size(*offset), bytes } })
            }
            Change::SetLength { device, length } => Some(Self { device: *device, what: What::Length(size(*length)) }),
            Change::Flush { .. } => None,
        }
    }

    pub(super) fn apply(&self, files: &mut Files) {
        let file = files.entry(self.device).or_default();
        match self.what {
            What::Bytes { offset, bytes } => {
                let end = offset.saturating_add(bytes.len());
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[offset..end].copy_from_slice(bytes);
            }
            What::Length(length) => file.resize(length, 0),
        }
    }

    /// The sectors that are written.
    fn sectors(&self) -> impl Iterator<Item = (u32, usize)> {
        let (device, range) = match self.what {
            What::Bytes { offset, bytes } => {
                (self.device, offset / SECTOR..offset.saturating_add(bytes.len()).div_ceil(SECTOR))
            }
            What::Length(_) => (self.device, 0..0),
        };
        range.map(move |sector| (device, sector))
    }
}

/// The sectors of a piece, each of which may be lost alone.
pub(super) fn torn(piece: Piece<'_>) -> Vec<Piece<'_>> {
    let What::Bytes { offset, bytes } = piece.what else { return Vec::from([piece]) };
    let mut pieces = Vec::new();
    let (mut at, mut rest) = (offset, bytes);
    while !rest.is_empty() {
        let (sector, after) = rest.split_at((SECTOR - at % SECTOR).min(rest.len()));
        pieces.push(Piece { device: piece.device, what: What::Bytes { offset: at, bytes: sector } });
        at = at.saturating_add(sector.len());
        rest = after;
    }
    pieces
}

/// The pieces of which all subsets are looked at, in the order in which they were written.
pub(super) struct Pieces<'a> {
    pub(super) pieces: Vec<Piece<'a>>,
    /// Whether none is more than a sector: the subsets are all states that there can be.
    pub(super) is_complete: bool,
}

impl<'a> Pieces<'a> {
    /// At most `most` pieces of these changes, those with the fewest sectors torn first; `None` if even whole they are more.
    /// What changes nothing of the `durable` files, and nothing that another of the changes writes, is no piece.
    pub(super) fn of(changes: &[&'a Change], durable: &Files, most: usize) -> Option<Self> {
        let whole: Vec<Piece<'a>> = changes.iter().filter_map(|change| Piece::of(change)).collect();
        let mut writers: BTreeMap<(u32, usize), usize> = BTreeMap::new();
        whole.iter().flat_map(Piece::sectors).for_each(|sector| *writers.entry(sector).or_default() += 1);
        let is_cut: BTreeSet<u32> =
            whole.iter().filter(|piece| matches!(piece.what, What::Length(_))).map(|piece| piece.device).collect();
        let counts = |piece: &Piece<'_>| {
            let What::Bytes { offset, bytes } = piece.what else { return true };
            let held = durable.get(&piece.device).and_then(|file| file.get(offset..)?.get(..bytes.len()));
            let is_alone = || piece.sectors().all(|sector| writers.get(&sector) == Some(&1));
            held != Some(bytes) || is_cut.contains(&piece.device) || !is_alone()
        };
        let sectors: Vec<Vec<Piece<'a>>> = whole.iter().map(|piece| torn(*piece)).collect();
        let sectors: Vec<Vec<Piece<'a>>> =
            sectors.into_iter().map(|pieces| pieces.into_iter().filter(|piece| counts(piece)).collect()).collect();
        let mut total = sectors.iter().filter(|pieces| !pieces.is_empty()).count();
        if total > most {
            return None;
        }
        let mut smallest: Vec<usize> = (0..sectors.len()).filter(|&index| !sectors[index].is_empty()).collect();
        smallest.sort_by_key(|&index| sectors[index].len());
        let mut is_torn = BTreeSet::new();
        for index in &smallest {
            let more = total - 1 + sectors[*index].len();
            if more > most {
                break;
            }
            total = more;
            is_torn.insert(*index);
        }
        let is_complete = is_torn.len() == smallest.len();
        let mut pieces = Vec::with_capacity(total);
        for (index, (whole, sectors)) in whole.into_iter().zip(sectors).enumerate() {
            match (is_torn.contains(&index), sectors.is_empty()) {
                (_, true) => {}
                (true, false) => pieces.extend(sectors),
                (false, false) => pieces.push(whole),
            }
        }
        Some(Self { pieces, is_complete })
    }
}
