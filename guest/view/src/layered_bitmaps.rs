//! The bitmaps of several layers seen as one disk: those of one name are one bitmap, as far as they follow each other from the
//! top-most layer down.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DirtyRange, ErrorCode};
use instar_guest_sdk::{Bitmap, DirtyRanges, DriverError, DriverResult};

/// Where the bitmaps of each name are.
#[derive(Default)]
pub struct LayeredBitmaps {
    /// For each name, the layers that have it, the top-most first, each with the index of its bitmap.
    places: Vec<Vec<(usize, u32)>>,
    layers: usize,
}

/// Asks a layer for what its bitmap of that index calls dirty; returns where to go on.
type Ask<'a> = &'a mut dyn FnMut(usize, u32, &mut DirtyRanges) -> DriverResult<u64>;

impl LayeredBitmaps {
    /// Those of these layers, the top-most first.
    pub fn new(lists: &[Vec<Bitmap>]) -> Self {
        let mut numbers: BTreeMap<&[u8], usize> = BTreeMap::new();
        let mut places: Vec<Vec<(usize, u32)>> = Vec::new();
        for (layer, list) in lists.iter().enumerate() {
            for (own, bitmap) in (0..).zip(list) {
                let number = *numbers.entry(&bitmap.name).or_insert(places.len());
                match places.get_mut(number) {
                    Some(places) => places.push((layer, own)),
                    None => places.push([(layer, own)].into()),
                }
            }
        }
        Self { places, layers: lists.len() }
    }

    /// The bitmaps, as one disk has them: of what the layers say, the worst counts.
    pub fn seen(&self, lists: &[Vec<Bitmap>]) -> Vec<Bitmap> {
        let of_layers = |places: &Vec<(usize, u32)>| {
            let own = |&(layer, own): &(usize, u32)| lists.get(layer)?.get(usize::try_from(own).ok()?);
            let all: Vec<&Bitmap> = places.iter().filter_map(own).collect();
            let first = all.first()?;
            Some(Bitmap {
                enabled: all.iter().all(|bitmap| bitmap.enabled),
                inconsistent: all.iter().any(|bitmap| bitmap.inconsistent),
                ends: places.len() < self.layers,
                interrupted: places.iter().enumerate().any(|(depth, &(layer, _))| depth != layer),
                ..(*first).clone()
            })
        };
        self.places.iter().filter_map(of_layers).collect()
    }

    /// What the layers call dirty together, from the guest byte on from which they are asked, of a disk of `size` bytes: see
    /// [`Source::dirty`](instar_guest_sdk::Source::dirty).
    ///
    /// # Errors
    /// Those of the layers.
    pub fn dirty(&self, ask: Ask<'_>, index: u32, size: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        let places = usize::try_from(index).ok().and_then(|index| self.places.get(index));
        let places = places.ok_or_else(|| DriverError::new(ErrorCode::InternalOverflow, "a bitmap of no layer"))?;
        let share = (out.most() / places.len().max(1)).max(1);
        let (mut next, mut all) = (size, Vec::new());
        for &(layer, own) in places {
            let mut found = DirtyRanges::with_room_for(share);
            next = next.min(ask(layer, own, &mut found)?);
            all.extend_from_slice(&found);
        }
        all.sort_unstable_by_key(|range: &DirtyRange| range.start);
        for DirtyRange { start, end } in all {
            if start >= next {
                break;
            }
            if !out.push(start, end.min(next)) {
                return Ok(start);
            }
        }
        Ok(next)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec;

    fn bitmap(name: &[u8]) -> Bitmap {
        Bitmap::new(name.to_vec(), 512, true, false)
    }

    #[test]
    fn bitmaps_of_one_name_are_one() {
        let off = Bitmap { enabled: false, ..bitmap(b"off") };
        let lists = [
            vec![bitmap(b"all"), bitmap(b"top"), bitmap(b"gap"), bitmap(b"off")],
            vec![bitmap(b"low"), bitmap(b"all"), off],
            vec![bitmap(b"all"), bitmap(b"gap"), bitmap(b"low")],
        ];
        let seen = LayeredBitmaps::new(&lists).seen(&lists);
        let flags: Vec<_> = seen.iter().map(|b| (b.name.as_slice(), b.enabled, b.ends, b.interrupted)).collect();
        let expected: [(&[u8], bool, bool, bool); 5] = [
            (b"all", true, false, false),
            (b"top", true, true, false),
            (b"gap", true, true, true),
            (b"off", false, true, false),
            (b"low", true, true, true),
        ];
        assert_eq!(flags, expected);
    }

    #[test]
    fn what_is_dirty_in_any_layer_is_dirty() {
        let lists = [vec![bitmap(b"b")], vec![bitmap(b"b")]];
        let layers = [vec![(0, 10), (30, 40), (60, 70)], vec![(5, 15), (35, 50), (65, 66), (80, 100)]];
        let bitmaps = LayeredBitmaps::new(&lists);
        for most in 1..8 {
            let (mut from, mut found, mut calls) = (0, DirtyRanges::with_room_for(100), 0);
            while from < 100 {
                let mut out = DirtyRanges::with_room_for(most);
                let mut ask = |layer: usize, _, out: &mut DirtyRanges| {
                    let rest = layers[layer].iter().filter(|range| range.1 > from);
                    for &(start, end) in rest {
                        if !out.push(start.max(from), end) {
                            return Ok(start);
                        }
                    }
                    Ok(100)
                };
                from = bitmaps.dirty(&mut ask, 0, 100, &mut out).unwrap();
                assert!(out.iter().all(|range| found.push(range.start, range.end)));
                calls += 1;
                assert!(calls < 20, "it does not advance");
            }
            let all: Vec<_> = found.iter().map(|range| (range.start, range.end)).collect();
            assert_eq!(all, [(0, 15), (30, 50), (60, 70), (80, 100)], "{most}");
        }
    }
}
