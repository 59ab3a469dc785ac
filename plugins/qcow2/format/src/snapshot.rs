//! The snapshot table ("Snapshots" in the specification).

use crate::error::HeaderError;
use crate::types::HostOffset;
use alloc::format;
use alloc::vec::Vec;

/// Bytes of an entry before its extra data and names.
const FIXED_BYTES: usize = 40;
/// Most bytes of extra data that QEMU takes.
const MAX_EXTRA: u32 = 1024;

/// What an entry of the snapshot table says about the clusters of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where the snapshot's L1 table begins.
    pub l1_table: HostOffset,
    /// Number of entries of that table.
    pub l1_entries: u32,
    /// Virtual size of the snapshot in bytes: bytes 8 to 15 of the extra data, which version 2 need not have.
    pub virtual_size: Option<u64>,
    /// Name of the snapshot, as it stands in the image. Hostile.
    pub name: Vec<u8>,
}

impl Snapshot {
    /// Parse the entry that begins at `at` of `table`, which begins at byte `base` of the file. Returns the entry, and
    /// where the next one begins: entries are padded to 8 bytes. `None` if `table` ends within the entry.
    ///
    /// # Errors
    /// Extra data that is longer than QEMU takes.
    pub fn parse(table: &[u8], at: usize, base: u64) -> Result<Option<(Self, usize)>, HeaderError> {
        let Some(fixed) = at.checked_add(FIXED_BYTES).and_then(|end| table.get(at..end)) else {
            return Ok(None);
        };
        let u16_at = |i: usize| usize::from(u16::from_be_bytes([fixed[i], fixed[i + 1]]));
        let u32_at = |i: usize| u32::from_be_bytes([fixed[i], fixed[i + 1], fixed[i + 2], fixed[i + 3]]);
        let extra = u32_at(36);
        if extra > MAX_EXTRA {
            let text = format!("the snapshot table has an entry with {extra} bytes of extra data");
            return Err(HeaderError::corrupt(base.saturating_add(at as u64), text));
        }
        let id_at = at + FIXED_BYTES + usize::try_from(extra).unwrap_or(usize::MAX);
        let name_at = id_at.saturating_add(u16_at(12));
        let end = name_at.saturating_add(u16_at(14));
        let Some(name) = table.get(name_at..end) else {
            return Ok(None);
        };
        let l1_table = (u64::from(u32_at(0)) << 32) | u64::from(u32_at(4));
        let size_at = at + FIXED_BYTES + 8;
        let virtual_size = table.get(size_at..size_at + 8).filter(|_| extra >= 16);
        let virtual_size = virtual_size.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let snapshot =
            Self { l1_table: HostOffset(l1_table), l1_entries: u32_at(8), virtual_size, name: name.to_vec() };
        Ok(Some((snapshot, end.next_multiple_of(8))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &[u8], extra: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0x5_0000u64.to_be_bytes());
        bytes.extend(7u32.to_be_bytes());
        bytes.extend(2u16.to_be_bytes());
        bytes.extend(u16::try_from(name.len()).unwrap_or(0).to_be_bytes());
        bytes.extend([0; 20]);
        bytes.extend(extra.to_be_bytes());
        bytes.extend(core::iter::repeat_n(9, extra as usize));
        bytes.extend(b"id");
        bytes.extend(name);
        bytes
    }

    #[test]
    fn entries_follow_each_other_padded_to_eight_bytes() {
        let mut table = entry(b"first", 24);
        let padded = table.len().next_multiple_of(8);
        table.resize(padded, 0);
        table.extend(entry(b"", 0));
        let (first, next) = Snapshot::parse(&table, 0, 0).unwrap_or_default().unwrap_or_else(|| unreachable!());
        assert_eq!((first.l1_table, first.l1_entries, first.name.as_slice()), (HostOffset(0x5_0000), 7, &b"first"[..]));
        assert_eq!(first.virtual_size, Some(0x0909_0909_0909_0909));
        assert_eq!(next, padded);
        let second = Snapshot::parse(&table, next, 0).unwrap_or_default();
        assert!(second.is_some_and(|(entry, _)| entry.name.is_empty() && entry.virtual_size.is_none()));
    }

    #[test]
    fn entries_that_are_cut_off_or_too_long() {
        let table = entry(b"name", 16);
        for length in 0..table.len() {
            assert_eq!(Snapshot::parse(&table[..length], 0, 0), Ok(None), "{length}");
        }
        assert!(Snapshot::parse(&entry(b"name", 1025), 0, 0).is_err());
        assert_eq!(Snapshot::parse(&table, usize::MAX, 0), Ok(None));
    }
}
