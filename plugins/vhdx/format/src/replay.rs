//! What the log still has to do to the file, in memory: a program that only reads sees the file through it (2.3.3, note
//! 5).

use crate::{FormatError, LogEntry, Update, LOG_SECTOR, LONGEST_FILE, REGION_TABLE_OFFSETS};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;

const PAGE: u64 = LOG_SECTOR as u64;

/// The changes of an active sequence, the last of each byte.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Pages by their byte offset. They come after [`zeroes`](Self::zeroes).
    pages: BTreeMap<u64, Vec<u8>>,
    /// Ranges that become zero, ascending and apart.
    zeroes: Vec<Range<u64>>,
    /// The file is at least as long in bytes once the log is replayed.
    file_length: u64,
}

impl Replay {
    /// What these entries do, in their order, to a file of `file_length` bytes whose log is at the bytes `log`.
    ///
    /// # Errors
    /// If the file was cut off (2.3.3), or a change goes where none may go: into the headers, or into the log (2.3).
    pub fn new(entries: Vec<LogEntry>, log: &Range<u64>, file_length: u64) -> Result<Self, FormatError> {
        let corrupt = |text| Err(FormatError::corrupt(log.start, text));
        let mut replay = Self { file_length, ..Self::default() };
        if let Some(head) = entries.last() {
            if file_length < head.flushed_file {
                return corrupt(format!(
                    "the file has {file_length} bytes, and the log says that it had {} when it was last written",
                    head.flushed_file
                ));
            }
            replay.file_length = file_length.max(head.last_file);
        }
        for update in entries.into_iter().flat_map(|entry| entry.updates) {
            let range = match &update {
                Update::Zero(range) => range.clone(),
                Update::Page { offset, .. } => *offset..offset.saturating_add(PAGE),
            };
            if range.is_empty() {
                continue;
            }
            if range.start < REGION_TABLE_OFFSETS[0] || (range.start < log.end && log.start < range.end) {
                return corrupt(format!("the log changes byte {} of the file, in a header or in the log", range.start));
            }
            replay.file_length = replay.file_length.max(range.end);
            match update {
                Update::Page { offset, bytes } => drop(replay.pages.insert(offset, bytes)),
                Update::Zero(range) => {
                    let gone: Vec<u64> = replay.pages.range(range.clone()).map(|(offset, _)| *offset).collect();
                    gone.into_iter().for_each(|offset| drop(replay.pages.remove(&offset)));
                    replay.zeroes.push(range);
                }
            }
        }
        if replay.file_length > LONGEST_FILE {
            return corrupt(format!(
                "the log makes the file {} bytes long, and no VHDX needs that",
                replay.file_length
            ));
        }
        replay.zeroes.sort_unstable_by_key(|range| range.start);
        replay.zeroes.dedup_by(|next, last| {
            let joined = next.start <= last.end;
            if joined {
                last.end = last.end.max(next.end);
            }
            joined
        });
        Ok(replay)
    }

    /// How long the file is at least once the log is replayed, in bytes.
    #[must_use]
    pub const fn file_length(&self) -> u64 {
        self.file_length
    }

    /// Apply what the log does to `bytes`, which were read at byte `offset` of the file.
    pub fn apply(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset.saturating_add(bytes.len() as u64);
        let index = |at: u64| usize::try_from(at.clamp(offset, end) - offset).unwrap_or(0);
        let first = self.zeroes.partition_point(|range| range.end <= offset);
        for range in self.zeroes.iter().skip(first).take_while(|range| range.start < end) {
            bytes[index(range.start)..index(range.end)].fill(0);
        }
        for (start, page) in self.pages.range(offset.saturating_sub(PAGE - 1)..end) {
            let (from, to) = (index(*start), index(start.saturating_add(PAGE)));
            let skipped = usize::try_from(offset.saturating_sub(*start)).unwrap_or(0);
            let part = page.get(skipped..).and_then(|rest| rest.get(..to - from)).unwrap_or_default();
            bytes[from..from + part.len()].copy_from_slice(part);
        }
    }

    /// Whether the log changes anything of these bytes of the file.
    #[must_use]
    pub fn touches(&self, range: &Range<u64>) -> bool {
        let first = self.zeroes.partition_point(|zero| zero.end <= range.start);
        let zeroes = self.zeroes.get(first).is_some_and(|zero| zero.start < range.end);
        zeroes || self.pages.range(range.start.saturating_sub(PAGE - 1)..range.end).next().is_some()
    }

    /// The ranges that become zero, before the pages are written.
    pub fn zeroes(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.zeroes.iter().cloned()
    }

    /// The pages with their byte offsets, ascending.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> + '_ {
        self.pages.iter().map(|(offset, bytes)| (*offset, bytes.as_slice()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec;

    const LOG: Range<u64> = 1 << 20..2 << 20;

    fn page(offset: u64, byte: u8) -> Update {
        Update::Page { offset, bytes: vec![byte; LOG_SECTOR] }
    }

    fn replay(updates: Vec<Update>, flushed_file: u64, last_file: u64) -> Result<Replay, FormatError> {
        let entry = LogEntry { at: 0, length: 4096, tail: 0, sequence: 1, flushed_file, last_file, updates };
        Replay::new(vec![entry], &LOG, 3 << 20)
    }

    #[test]
    fn the_last_change_of_each_byte_counts() {
        let base = 2 << 20;
        let updates = vec![
            page(base, 1),
            page(base + 4096, 2),
            Update::Zero(base + 4096..base + 12288),
            page(base + 8192, 3),
            Update::Zero(base + 16384..base + 20480),
            Update::Zero(base + 12288..base + 16384),
        ];
        let replay = replay(updates, 0, 0).unwrap();
        let mut bytes = vec![9; 24576];
        replay.apply(base, &mut bytes);
        let expected: Vec<u8> = [1, 0, 3, 0, 0, 9].into_iter().flat_map(|byte| vec![byte; 4096]).collect();
        assert!(bytes == expected);
        for (from, to) in [(0, 1), (4095, 4097), (100, 9000), (8191, 8193), (20479, 20481), (20480, 24576)] {
            let mut part = vec![9; to - from];
            replay.apply(base + from as u64, &mut part);
            assert!(part == expected[from..to], "{from}..{to}");
            assert_eq!(replay.touches(&(base + from as u64..base + to as u64)), from < 20480, "{from}..{to}");
        }
        assert!(!replay.touches(&(base - 4096..base)));
        assert!(replay.zeroes().eq(core::iter::once(base + 4096..base + 20480)));
        assert_eq!(replay.pages().count(), 2);
        assert_eq!(replay.file_length(), 3 << 20);
    }

    #[test]
    fn changes_go_where_metadata_may_be() {
        let refused = |updates, flushed| replay(updates, flushed, 0).unwrap_err().text;
        assert!(refused(vec![page(128 << 10, 1)], 0).contains("header or in the log"));
        assert!(refused(vec![page(1 << 20, 1)], 0).contains("header or in the log"));
        assert!(refused(vec![Update::Zero(256 << 10..3 << 20)], 0).contains("header or in the log"));
        assert!(refused(vec![Update::Zero(2 << 20..u64::MAX)], 0).contains("no VHDX needs that"));
        assert!(refused(vec![], 4 << 20).contains("last written"));
        assert!(replay(vec![page(192 << 10, 1), page(256 << 10, 1)], 3 << 20, 0).is_ok());
        assert_eq!(replay(vec![], 0, 9 << 20).unwrap().file_length(), 9 << 20);
        assert_eq!(replay(vec![page(7 << 20, 1)], 0, 0).unwrap().file_length(), (7 << 20) + 4096);
    }
}
