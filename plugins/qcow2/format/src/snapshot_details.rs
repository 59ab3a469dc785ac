//! What an entry of the snapshot table says to people: nothing of it matters to a commit.

use crate::error::HeaderError;
use crate::snapshot::Snapshot;
use alloc::vec::Vec;

/// What `qemu-img info` shows of an internal snapshot, besides its name ("Snapshots" in the specification).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotDetails {
    /// Its identifier, as it stands in the image. Hostile.
    pub id: Vec<u8>,
    /// Its name. Hostile.
    pub name: Vec<u8>,
    /// Virtual size of its disk in bytes, which version 2 need not record.
    pub virtual_size: Option<u64>,
    /// When it was made, in seconds since 1970.
    pub date_seconds: u32,
    /// … and nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of the state of the virtual machine.
    pub vm_state_bytes: u64,
    /// Instructions that the guest had executed, if that was counted: bytes 16 to 23 of the extra data.
    pub instructions: Option<u64>,
}

impl SnapshotDetails {
    /// Parse the entry that begins at `at` of `table`, as [`Snapshot::parse`] does.
    ///
    /// # Errors
    /// As [`Snapshot::parse`].
    pub fn parse(table: &[u8], at: usize, base: u64) -> Result<Option<(Self, usize)>, HeaderError> {
        let Some((snapshot, next)) = Snapshot::parse(table, at, base)? else { return Ok(None) };
        // The entry lies whole in the table.
        let bytes = table.get(at..).unwrap_or_default();
        let u32_at = |i: usize| bytes.get(i..i + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        let u64_at = |i: usize| (u64::from(u32_at(i)) << 32) | u64::from(u32_at(i + 4));
        let extra = usize::try_from(u32_at(36)).unwrap_or(0);
        let (id_at, id_length) =
            (40 + extra, bytes.get(12..14).map_or(0, |b| usize::from(u16::from_be_bytes([b[0], b[1]]))));
        let details = Self {
            id: bytes.get(id_at..id_at + id_length).unwrap_or_default().to_vec(),
            name: snapshot.name,
            virtual_size: snapshot.virtual_size,
            date_seconds: u32_at(16),
            date_nanoseconds: u32_at(20),
            vm_clock_nanoseconds: u64_at(24),
            vm_state_bytes: if extra >= 8 { u64_at(40) } else { u64::from(u32_at(32)) },
            instructions: (extra >= 24).then(|| u64_at(56)).filter(|&count| count != u64::MAX),
        };
        Ok(Some((details, next)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_entry_says() {
        let mut bytes = alloc::vec![0u8; 40];
        bytes[12..16].copy_from_slice(&[0, 2, 0, 4]);
        bytes[16..24].copy_from_slice(&[0, 0, 1, 0, 0, 0, 0, 9]);
        bytes[24..32].copy_from_slice(&7_000_000_001u64.to_be_bytes());
        bytes[32..36].copy_from_slice(&5u32.to_be_bytes());
        let short: Vec<u8> = bytes.iter().chain(b"42name").copied().collect();
        let (parsed, next) = SnapshotDetails::parse(&short, 0, 0).unwrap_or_default().unwrap_or_else(|| unreachable!());
        assert_eq!((parsed.id.as_slice(), parsed.name.as_slice(), next), (&b"42"[..], &b"name"[..], 48));
        assert_eq!(
            (parsed.date_seconds, parsed.date_nanoseconds, parsed.vm_clock_nanoseconds),
            (256, 9, 7_000_000_001)
        );
        assert_eq!((parsed.vm_state_bytes, parsed.instructions), (5, None));
        bytes[36..40].copy_from_slice(&24u32.to_be_bytes());
        for value in [1u64 << 40, 0, 77] {
            bytes.extend(value.to_be_bytes());
        }
        bytes.extend(b"42name");
        let (parsed, _) = SnapshotDetails::parse(&bytes, 0, 0).unwrap_or_default().unwrap_or_else(|| unreachable!());
        assert_eq!((parsed.vm_state_bytes, parsed.instructions), (1 << 40, Some(77)));
        for length in 0..bytes.len() {
            assert_eq!(SnapshotDetails::parse(&bytes[..length], 0, 0), Ok(None), "{length}");
        }
    }
}
