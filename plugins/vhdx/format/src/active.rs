//! Which entries of the log are to be replayed: the active sequence (2.3.2, 2.3.3).

use crate::{FormatError, Guid, Header, LogEntry, LOG_SECTOR};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Bytes whose checksums are made for each byte of the log, at most: entries that follow each other are looked at once, and
/// what is torn is rare.
const CHECKED: usize = 16;

/// The entries that were looked at: the search comes by some of them again.
struct Seen<'a> {
    log: &'a [u8],
    guid: Guid,
    entries: BTreeMap<usize, Option<LogEntry>>,
    left: usize,
}

impl Seen<'_> {
    /// The entry at a byte of the log; an error if checking it would be too much.
    fn entry(&mut self, at: usize) -> Result<Option<&LogEntry>, ()> {
        if !self.entries.contains_key(&at) {
            let claimed = LogEntry::claimed_length(self.log, at, &self.guid).unwrap_or(0);
            self.left = self.left.checked_sub(claimed).ok_or(())?;
            self.entries.insert(at, LogEntry::read(self.log, at, &self.guid));
        }
        Ok(self.entries.get(&at).and_then(Option::as_ref))
    }

    /// The entries that follow each other from byte `tail` on, by their places.
    fn run(&mut self, tail: usize) -> Result<Vec<usize>, ()> {
        let (mut places, mut taken, mut at, whole) = (Vec::new(), 0usize, tail, self.log.len());
        let mut sequence = None;
        while let Some(entry) = self.entry(at)? {
            taken = taken.saturating_add(entry.length);
            if sequence.is_some_and(|before: u64| before.checked_add(1) != Some(entry.sequence)) || taken > whole {
                break;
            }
            sequence = Some(entry.sequence);
            let next = at.saturating_add(entry.length);
            places.push(at);
            at = if next >= whole { next - whole } else { next };
        }
        Ok(places)
    }
}

/// The entries that have to be replayed, in their order: from the tail of the newest sequence that is whole to its head.
/// `log` is all of the log of `header`, whose LogGuid is not null.
///
/// # Errors
/// If there is none, the image is corrupt (2.3.3); so is a log whose entries overlap more than any program makes them.
pub fn active_sequence(log: &[u8], header: &Header) -> Result<Vec<LogEntry>, FormatError> {
    let left = log.len().saturating_mul(CHECKED);
    let mut seen = Seen { log, guid: header.log_guid, entries: BTreeMap::new(), left };
    let (mut tail, mut best) = (0, (0, Vec::new()));
    let too_much = |()| FormatError::corrupt(header.log_offset, "the entries of the log overlap each other");
    while tail < log.len() {
        let run = seen.run(tail).map_err(too_much)?;
        let last = run.last().and_then(|place| seen.entries.get(place)?.as_ref());
        let found = last.and_then(|last| {
            let first = run.iter().position(|place| *place == last.tail)?;
            Some((last.sequence, last.at.saturating_add(last.length), first))
        });
        tail = match found {
            Some((sequence, end, first)) => {
                if sequence > best.0 {
                    best = (sequence, run.get(first..).unwrap_or_default().to_vec());
                }
                // Behind the run; where it has gone on at the beginning, everything was looked at.
                if end > log.len() || run.last() < run.first() {
                    break;
                }
                end
            }
            None => tail + LOG_SECTOR,
        };
    }
    let entries: Vec<LogEntry> = best.1.iter().filter_map(|place| seen.entries.get(place)?.clone()).collect();
    if entries.is_empty() {
        let text = "the log is to be replayed, and has no valid sequence of entries";
        return Err(FormatError::corrupt(header.log_offset, text));
    }
    Ok(entries)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use crate::{crc, put, NewEntry, Update, ALIGNMENT};
    use alloc::vec;

    const GUID: Guid = Guid([3; 16]);

    fn header() -> Header {
        let mut header = Header::new(1, Guid([1; 16]), Guid([2; 16]), ALIGNMENT, 1 << 16);
        header.log_guid = GUID;
        header
    }

    /// An entry of two sectors, at sector `at` of a ring of sixteen.
    fn entry(log: &mut [u8], at: usize, sequence: u64, tail: usize, guid: Guid) {
        let updates = [Update::Page { offset: sequence << 20, bytes: vec![sequence as u8; LOG_SECTOR] }];
        let mut bytes = NewEntry { at: 0, sequence, guid, file_length: 1 << 20, updates: &updates }.encode();
        put(&mut bytes, 12, &((tail * LOG_SECTOR) as u32).to_le_bytes());
        crc::seal(&mut bytes);
        for (index, sector) in bytes.chunks(LOG_SECTOR).enumerate() {
            let place = (at + index) % 16 * LOG_SECTOR;
            log[place..place + LOG_SECTOR].copy_from_slice(sector);
        }
    }

    fn active(entries: &[(usize, u64, usize)], change: impl FnOnce(&mut Vec<u8>)) -> Option<Vec<u64>> {
        let mut log = vec![0; 1 << 16];
        for &(at, sequence, tail) in entries {
            entry(&mut log, at, sequence, tail, GUID);
        }
        change(&mut log);
        let found = active_sequence(&log, &header()).ok()?;
        Some(found.iter().map(|entry| entry.sequence).collect())
    }

    #[test]
    fn the_newest_whole_sequence_counts_from_its_tail_on() {
        let none = |_: &mut Vec<u8>| {};
        assert_eq!(active(&[(0, 1, 0)], none), Some(vec![1]));
        assert_eq!(active(&[(0, 1, 0), (2, 2, 0), (4, 3, 0)], none), Some(vec![1, 2, 3]));
        // Earlier ones are in their places: what they replaced may have been replaced since.
        assert_eq!(active(&[(0, 1, 0), (2, 2, 0), (4, 3, 2)], none), Some(vec![2, 3]));
        assert_eq!(active(&[(0, 1, 0), (2, 2, 2), (4, 3, 4)], none), Some(vec![3]));
        // The tail is not in the sequence, so an older one counts.
        assert_eq!(active(&[(0, 1, 0), (4, 9, 8)], none), Some(vec![1]));
        // An older one with a gap between, before and behind the newer one.
        assert_eq!(active(&[(0, 5, 0), (2, 6, 0), (5, 1, 5), (7, 2, 5)], none), Some(vec![5, 6]));
        assert_eq!(active(&[(0, 1, 0), (2, 2, 0), (5, 5, 5), (7, 6, 5)], none), Some(vec![5, 6]));
        // One that directly follows, with a lower number: the ring came round.
        assert_eq!(active(&[(0, 8, 0), (2, 9, 0), (4, 3, 4), (6, 4, 4)], none), Some(vec![8, 9]));
        // A sequence that goes on at the beginning, and an entry that does.
        assert_eq!(active(&[(12, 5, 12), (14, 6, 12), (0, 7, 12)], none), Some(vec![5, 6, 7]));
        assert_eq!(active(&[(13, 5, 13), (15, 6, 13), (1, 7, 13)], none), Some(vec![5, 6, 7]));
        assert_eq!(active(&[(13, 5, 13), (15, 6, 15)], none), Some(vec![6]));
        assert_eq!(active(&[], none), None);
    }

    #[test]
    fn what_is_torn_or_of_another_time_does_not_count() {
        let whole = [(0, 1, 0), (2, 2, 0), (4, 3, 0)];
        for sector in [4, 5] {
            let torn = active(&whole, |log| log[sector * LOG_SECTOR + 100] ^= 1);
            assert_eq!(torn, Some(vec![1, 2]), "sector {sector}");
        }
        assert_eq!(active(&whole, |log| log[2 * LOG_SECTOR + 100] ^= 1), Some(vec![1]));
        assert_eq!(active(&whole, |log| entry(log, 4, 3, 0, Guid([9; 16]))), Some(vec![1, 2]));
        assert_eq!(active(&whole, |log| log.fill(0)), None);
        // The tail itself is gone.
        assert_eq!(active(&[(0, 1, 0), (2, 2, 0)], |log| log[100] ^= 1), None);
    }

    #[test]
    fn entries_that_claim_all_of_the_log_everywhere_are_given_up() {
        let mut log = vec![0; 1 << 20];
        for at in (0..log.len()).step_by(LOG_SECTOR) {
            let mut bytes = NewEntry { at: 0, sequence: 1, guid: GUID, file_length: 1 << 20, updates: &[] }.encode();
            put(&mut bytes, 8, &(1u32 << 20).to_le_bytes());
            log[at..at + LOG_SECTOR].copy_from_slice(&bytes);
        }
        assert!(active_sequence(&log, &header()).unwrap_err().text.contains("overlap"));
    }
}
