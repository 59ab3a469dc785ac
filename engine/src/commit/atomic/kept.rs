//! The ranges of a target that an undo log has, each once.

use crate::undo::KEPT_BLOCK as BLOCK;
use std::collections::BTreeMap;
use std::ops::Range;

/// Where each of them begins and ends.
#[derive(Debug, Default)]
pub struct Kept(BTreeMap<u64, u64>);

impl Kept {
    /// The parts of these ranges, by whole blocks, that are within a file of `length` bytes and not kept yet; ascending.
    pub fn missing(&self, ranges: &[Range<u64>], length: u64) -> Vec<Range<u64>> {
        let block = |range: &Range<u64>| {
            let start = range.start / BLOCK * BLOCK;
            let end = range.end.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
            start..end.min(length)
        };
        let mut wanted: Vec<Range<u64>> = ranges
            .iter()
            .filter(|range| range.start < range.end)
            .map(block)
            .filter(|range| range.start < range.end)
            .collect();
        wanted.sort_by_key(|range| range.start);
        let mut missing = Vec::new();
        let mut from = 0;
        for Range { start, end } in wanted {
            let mut at = start.max(from);
            from = from.max(end);
            while at < end {
                let before = self.0.range(..=at).next_back().map_or(0, |(_, end)| *end);
                if before > at {
                    at = before;
                    continue;
                }
                let next = self.0.range(at..).next().map_or(end, |(start, _)| (*start).min(end));
                missing.push(at..next);
                at = next;
            }
        }
        missing
    }

    /// This range is kept.
    pub fn note(&mut self, range: &Range<u64>) {
        let Range { mut start, mut end } = *range;
        if let Some((&before, &until)) = self.0.range(..=start).next_back().filter(|(_, &until)| until >= start) {
            start = before;
            end = end.max(until);
        }
        if let Some((&after, &until)) = self.0.range(end..).next().filter(|(&after, _)| after == end) {
            self.0.remove(&after);
            end = until;
        }
        self.0.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_are_missing() {
        let mut kept = Kept::default();
        let wanted = [5000..5001, 0..10, 65_536..u64::MAX, 80_000..90_000, 7..7];
        assert_eq!(kept.missing(&wanted, 70_000), [0..4096, 4096..8192, 65_536..70_000]);
        for range in [4096..8192, 0..4096, 12_288..16_384] {
            kept.note(&range);
        }
        assert_eq!(kept.missing(&[0..20_000, 1..1], 70_000), [8192..12_288, 16_384..20_480]);
        kept.note(&(8192..12_288));
        assert_eq!(kept.0.iter().collect::<Vec<_>>(), [(&0, &16_384)]);
    }
}
