//! The region tables: where block allocation table and metadata stand (2.2.3).

use crate::{crc, put, u32_at, u64_at, FormatError, Guid, ALIGNMENT};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Bytes of a region table.
pub const REGION_TABLE_BYTES: usize = 64 << 10;
/// Where the two copies stand in the file, in bytes.
pub const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];

/// GUIDs of the known regions (2.2.3.2).
pub mod ids {
    use crate::Guid;

    /// The block allocation table.
    pub const BAT: Guid = Guid::of(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
    /// The metadata.
    pub const METADATA: Guid = Guid::of(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
}

const REGI: [u8; 4] = *b"regi";
const MOST: u32 = 2047;
const ENTRY_BYTES: usize = 32;
const FIRST: usize = 16;

/// A region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it is.
    pub id: Guid,
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// Who does not know it may not open the file.
    pub required: bool,
}

impl Region {
    /// The bytes of the file that it takes.
    #[must_use]
    pub const fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length as u64)
    }
}

/// The regions of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionTable {
    /// In the order of the table.
    pub regions: Vec<Region>,
    /// Both copies are valid, and the same.
    pub both: bool,
}

/// The regions of one copy; `None` if its signature, checksum or count are wrong.
fn parse(bytes: &[u8]) -> Option<Vec<Region>> {
    let count = u32_at(bytes, 8);
    if bytes.len() != REGION_TABLE_BYTES || bytes[..4] != REGI || count > MOST || !crc::is_right(bytes) {
        return None;
    }
    let region = |index: u32| {
        let at = FIRST + index as usize * ENTRY_BYTES;
        let (offset, length) = (u64_at(bytes, at + 16), u32_at(bytes, at + 24));
        Region { id: Guid::at(bytes, at), offset, length, required: u32_at(bytes, at + 28) & 1 == 1 }
    };
    Some((0..count).map(region).collect())
}

impl RegionTable {
    /// Take both copies apart: one is enough, and two have to say the same.
    ///
    /// # Errors
    /// If none is valid, if they differ, and for regions that are not known, double, or where they cannot be: in the header
    /// section, in the log (`log`), in each other, or past the end of the file.
    pub fn choose(first: &[u8], second: &[u8], log: &Range<u64>, file_length: u64) -> Result<Self, FormatError> {
        let place = REGION_TABLE_OFFSETS[0];
        let (regions, both) = match (parse(first), parse(second)) {
            (None, None) => {
                return Err(FormatError::corrupt(place, "neither of the two region tables has a valid checksum"));
            }
            (Some(regions), None) | (None, Some(regions)) => (regions, false),
            (Some(first), Some(second)) if first == second => (first, true),
            (Some(_), Some(_)) => return Err(FormatError::corrupt(place, "the two region tables differ")),
        };
        let table = Self { regions, both };
        table.verify(log, file_length)?;
        Ok(table)
    }

    fn verify(&self, log: &Range<u64>, file_length: u64) -> Result<(), FormatError> {
        let place = REGION_TABLE_OFFSETS[0];
        for region in &self.regions {
            if region.required && region.id != ids::BAT && region.id != ids::METADATA {
                let text = format!("the region {} is required to be known, and is not", region.id);
                return Err(FormatError::unsupported(place, text));
            }
            let aligned = region.offset.is_multiple_of(ALIGNMENT) && u64::from(region.length).is_multiple_of(ALIGNMENT);
            if !aligned || region.offset < ALIGNMENT || region.length == 0 {
                let text = format!(
                    "the region {} of {} bytes at byte {} is not whole MiB behind the header section",
                    region.id, region.length, region.offset
                );
                return Err(FormatError::corrupt(place, text));
            }
            if region.offset.checked_add(region.length.into()).is_none_or(|end| end > file_length) {
                let text = format!("the region {} at byte {} goes past the end of the file", region.id, region.offset);
                return Err(FormatError::corrupt(place, text));
            }
        }
        let mut ids: Vec<Guid> = self.regions.iter().map(|region| region.id).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(FormatError::corrupt(place, format!("there are two regions {}", pair[0])));
        }
        let mut taken: Vec<Range<u64>> = self.regions.iter().map(Region::range).collect();
        taken.push(log.clone());
        taken.sort_unstable_by_key(|range| range.start);
        match taken.windows(2).find(|pair| pair[0].end > pair[1].start) {
            None => Ok(()),
            Some(pair) => {
                let text = format!("regions or log overlap at byte {} of the file", pair[1].start);
                Err(FormatError::corrupt(place, text))
            }
        }
    }

    /// A known region.
    ///
    /// # Errors
    /// If it is missing; `what` is its name.
    pub fn find(&self, id: Guid, what: &str) -> Result<Region, FormatError> {
        let missing = || FormatError::corrupt(REGION_TABLE_OFFSETS[0], format!("there is no region for the {what}"));
        self.regions.iter().find(|region| region.id == id).copied().ok_or_else(missing)
    }

    /// The bytes of a copy. Whatever stood behind the entries is gone ("Implementations MAY set this to zero").
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGION_TABLE_BYTES];
        put(&mut bytes, 0, &REGI);
        put(&mut bytes, 8, &u32::try_from(self.regions.len()).unwrap_or(0).to_le_bytes());
        for (index, region) in self.regions.iter().enumerate() {
            let at = FIRST + index * ENTRY_BYTES;
            put(&mut bytes, at, &region.id.0);
            put(&mut bytes, at + 16, &region.offset.to_le_bytes());
            put(&mut bytes, at + 24, &region.length.to_le_bytes());
            put(&mut bytes, at + 28, &u32::from(region.required).to_le_bytes());
        }
        crc::seal(&mut bytes);
        bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(id: Guid, offset: u64) -> Region {
        Region { id, offset, length: 1 << 20, required: true }
    }

    fn refused(regions: &[Region]) -> FormatError {
        let bytes = RegionTable { regions: regions.to_vec(), both: true }.encode();
        RegionTable::choose(&bytes, &bytes, &(MIB..2 * MIB), 10 * MIB).unwrap_err()
    }

    #[test]
    fn one_copy_is_enough() {
        let regions = vec![region(ids::BAT, 2 * MIB), region(ids::METADATA, 3 * MIB)];
        let bytes = RegionTable { regions: regions.clone(), both: true }.encode();
        let log = MIB..2 * MIB;
        let choose = |first: &[u8], second: &[u8]| RegionTable::choose(first, second, &log, 4 * MIB);
        assert_eq!(choose(&bytes, &bytes).unwrap(), RegionTable { regions: regions.clone(), both: true });
        let mut torn = bytes.clone();
        torn[60_000] ^= 1;
        for read in [choose(&bytes, &torn), choose(&torn, &bytes)] {
            assert_eq!(read.unwrap(), RegionTable { regions: regions.clone(), both: false });
        }
        assert!(choose(&torn, &torn).unwrap_err().text.contains("neither"));
        let other = RegionTable { regions: vec![regions[0]], both: true }.encode();
        assert!(choose(&bytes, &other).unwrap_err().text.contains("differ"));
        let found = choose(&bytes, &bytes).unwrap();
        assert_eq!(found.find(ids::BAT, "table").unwrap().offset, 2 * MIB);
        assert!(found.find(Guid([1; 16]), "thing").unwrap_err().text.contains("no region for the thing"));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let bat = region(ids::BAT, 2 * MIB);
        let unknown = refused(&[bat, region(Guid([1; 16]), 3 * MIB)]);
        assert!(unknown.trouble == crate::Trouble::Unsupported && unknown.text.contains("required"), "{unknown}");
        for (regions, words) in [
            ([bat, Region { offset: 3 * MIB + 4096, ..bat }], "whole MiB"),
            ([bat, Region { length: 0, ..bat }], "whole MiB"),
            ([bat, Region { offset: 0, ..bat }], "whole MiB"),
            ([bat, Region { offset: 10 * MIB, ..bat }], "past the end"),
            ([bat, Region { offset: u64::MAX << 20, ..bat }], "past the end"),
            ([bat, Region { offset: 5 * MIB, ..bat }], "two regions"),
            ([bat, region(ids::METADATA, 2 * MIB)], "overlap"),
            ([region(ids::BAT, MIB), region(ids::METADATA, 2 * MIB)], "overlap"),
        ] {
            assert!(refused(&regions).text.contains(words), "{words}: {}", refused(&regions));
        }
        let known = RegionTable {
            regions: vec![bat, Region { required: false, ..region(Guid([1; 16]), 5 * MIB) }],
            both: true,
        };
        assert!(RegionTable::choose(&known.encode(), &[], &(MIB..2 * MIB), 10 * MIB).is_ok());
    }
}
