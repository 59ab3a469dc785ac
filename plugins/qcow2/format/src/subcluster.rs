//! Extended L2 entries ("Extended L2 Entries" in the specification): 128 bits, with the state of 32 subclusters.

use crate::table::{EntryError, L2Entry};
use crate::types::{ClusterSize, HostOffset};
use crate::Version;

/// Subclusters of a cluster.
pub const SUBCLUSTERS: u32 = 32;
/// Smallest cluster that QEMU takes with extended entries, as log2 of its bytes: subclusters of 512 bytes.
const MIN_BITS: u32 = 14;

/// The state of the subclusters of a cluster: bit i is for subcluster i.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subclusters {
    /// Those whose data stands in the host cluster.
    pub allocated: u32,
    /// Those that read as zeroes.
    pub zero: u32,
}

impl Subclusters {
    /// Decode an extended entry: its two halves. An entry whose subclusters are all alike is returned as the standard entry
    /// that means the same, with `None`. For one with mixed subclusters, [`L2Entry::Data`] tells the host cluster, and
    /// [`L2Entry::Zero`] without an offset that there is none.
    ///
    /// # Errors
    /// [`EntryError`] as for standard entries (bit 0 is reserved here), and for a bitmap that contradicts itself or the
    /// offset.
    pub fn decode(entry: u64, bitmap: u64, size: ClusterSize) -> Result<(L2Entry, Option<Self>), EntryError> {
        // Version 2 is what tells the standard decoder that bit 0 is reserved.
        Self::of(L2Entry::decode(entry, size, Version::V2)?, bitmap, size)
    }

    /// Decode an extended entry of an image with an external data file; see [`L2Entry::decode_outside`].
    ///
    /// # Errors
    /// As [`decode`](Self::decode), and for compressed clusters.
    pub fn decode_outside(entry: u64, bitmap: u64, size: ClusterSize) -> Result<(L2Entry, Option<Self>), EntryError> {
        Self::of(L2Entry::decode_outside(entry, size, Version::V2)?, bitmap, size)
    }

    fn of(standard: L2Entry, bitmap: u64, size: ClusterSize) -> Result<(L2Entry, Option<Self>), EntryError> {
        let [allocated, zero] = [bitmap & 0xffff_ffff, bitmap >> 32].map(|half| u32::try_from(half).unwrap_or(0));
        if size.bits() < MIN_BITS || allocated & zero != 0 {
            return Err(EntryError::Subclusters(bitmap));
        }
        let host = match standard {
            L2Entry::Compressed { .. } if bitmap != 0 => return Err(EntryError::Subclusters(bitmap)),
            L2Entry::Compressed { .. } => return Ok((standard, None)),
            L2Entry::Data { offset, copied } => Some((offset, copied)),
            L2Entry::Unallocated | L2Entry::Zero { .. } => None,
        };
        if host.is_none() && allocated != 0 {
            return Err(EntryError::Subclusters(bitmap));
        }
        let zero_cluster = L2Entry::Zero { offset: host.map(|h| h.0), copied: host.is_some_and(|h| h.1) };
        Ok(match (host, allocated, zero) {
            (Some((offset, copied)), u32::MAX, _) => (L2Entry::Data { offset, copied }, None),
            (_, _, u32::MAX) => (zero_cluster, None),
            (None, _, 0) => (L2Entry::Unallocated, None),
            (Some((offset, copied)), ..) => (L2Entry::Data { offset, copied }, Some(Self { allocated, zero })),
            (None, ..) => (L2Entry::Zero { offset: None, copied: false }, Some(Self { allocated, zero })),
        })
    }

    /// Encode an extended entry, of a cluster that stands in this host cluster (with the COPIED flag) or in none: its two
    /// halves. Nothing can be allocated in none.
    #[must_use]
    pub fn encode(self, host: Option<(HostOffset, bool)>) -> (u64, u64) {
        let entry = host.map_or(L2Entry::Unallocated, |(offset, copied)| L2Entry::Data { offset, copied }).encode();
        (entry, u64::from(self.zero) << 32 | u64::from(self.allocated))
    }

    /// Runs of subclusters in the same state: first subcluster, number of them, and whether they have data (`true`) or
    /// read as zeroes (`false`). Those that have neither are left out.
    pub fn runs(self) -> impl Iterator<Item = (u32, u32, bool)> {
        let state = move |i: u32| (self.allocated >> i & 1 != 0, self.zero >> i & 1 != 0);
        let mut next = 0;
        core::iter::from_fn(move || {
            while next < SUBCLUSTERS {
                let (first, kind) = (next, state(next));
                while next < SUBCLUSTERS && state(next) == kind {
                    next += 1;
                }
                if kind != (false, false) {
                    return Some((first, next - first, kind.0));
                }
            }
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::COPIED;
    use alloc::vec::Vec;

    fn decode(entry: u64, bitmap: u64) -> Result<(L2Entry, Option<Subclusters>), EntryError> {
        Subclusters::decode(entry, bitmap, ClusterSize::from_bits(16).unwrap_or_else(|| unreachable!()))
    }

    #[test]
    fn uniform_entries_are_standard_entries() {
        let data = L2Entry::Data { offset: HostOffset(0x5_0000), copied: true };
        assert_eq!(decode(0x5_0000 | COPIED, 0xffff_ffff), Ok((data, None)));
        let zero = L2Entry::Zero { offset: Some(HostOffset(0x5_0000)), copied: true };
        assert_eq!(decode(0x5_0000 | COPIED, 0xffff_ffff << 32), Ok((zero, None)));
        assert_eq!(decode(0, 0xffff_ffff << 32), Ok((L2Entry::Zero { offset: None, copied: false }, None)));
        assert_eq!(decode(0, 0), Ok((L2Entry::Unallocated, None)));
        assert_eq!(decode(1 << 62 | 99, 0), Ok((L2Entry::Compressed { descriptor: 99 }, None)));
    }

    #[test]
    fn mixed_entries_have_runs() {
        let Ok((L2Entry::Data { .. }, Some(mixed))) = decode(0x5_0000, 0x8000_0000_0000_0007 | 0b11 << 36) else {
            unreachable!()
        };
        assert_eq!(mixed.runs().collect::<Vec<_>>(), [(0, 3, true), (4, 2, false), (31, 1, false)]);
        // A host cluster of which nothing is used.
        let empty = Subclusters { allocated: 0, zero: 0 };
        assert_eq!(
            decode(0x5_0000, 0),
            Ok((L2Entry::Data { offset: HostOffset(0x5_0000), copied: false }, Some(empty)))
        );
        assert_eq!(empty.runs().count(), 0);
    }

    #[test]
    fn entries_come_back() {
        let mixed = Subclusters { allocated: 0b101, zero: 1 << 31 };
        let (entry, bitmap) = mixed.encode(Some((HostOffset(0x5_0000), true)));
        assert_eq!(bitmap, 0x8000_0000_0000_0005);
        let data = L2Entry::Data { offset: HostOffset(0x5_0000), copied: true };
        assert_eq!(decode(entry, bitmap), Ok((data, Some(mixed))));
        let none = Subclusters { allocated: 0, zero: 6 };
        let (entry, bitmap) = none.encode(None);
        assert_eq!(decode(entry, bitmap), Ok((L2Entry::Zero { offset: None, copied: false }, Some(none))));
    }

    #[test]
    fn contradictions_are_refused() {
        for (entry, bitmap) in [(0x5_0000, 1 | 1 << 32), (0, 1), (1 << 62, 1), (1 << 62, 1 << 40)] {
            assert_eq!(decode(entry, bitmap), Err(EntryError::Subclusters(bitmap)));
        }
        assert_eq!(decode(0x5_0001, 0), Err(EntryError::Reserved(1)));
        let small = ClusterSize::from_bits(13).unwrap_or_else(|| unreachable!());
        assert!(Subclusters::decode(0, 0, small).is_err());
    }
}
