//! Parent locators ("Parent Locator Entry"): names of the parent, each for a platform, which stand elsewhere in the file.

use crate::{put, u32_at, u64_at, SECTOR};

/// Bytes of an entry of the locator table.
pub(crate) const LOCATOR_BYTES: usize = 24;
/// Longest name that is read, in bytes: a path of Windows has 32,767 units at most.
pub const MAX_LOCATOR_BYTES: u64 = 64 << 10;

/// "Platform Code" of those whose names are read.
pub mod codes {
    /// A path relative to the child's directory, in UTF-16, little-endian.
    pub const W2RU: [u8; 4] = *b"W2ru";
    /// An absolute path of Windows, in UTF-16, little-endian.
    pub const W2KU: [u8; 4] = *b"W2ku";
    /// A file URL in UTF-8 (RFC 2396). XenServer writes relative ones: `file://./base.vhd`.
    pub const MACX: [u8; 4] = *b"MacX";
}

/// An entry of the locator table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locator {
    /// "Platform Code".
    pub code: [u8; 4],
    /// "Platform Data Space": what is kept for the name. In sectors by the specification, in bytes by Hyper-V and XenServer.
    pub space: u32,
    /// "Platform Data Length" of the name in bytes.
    pub length: u32,
    /// "Platform Data Offset": byte offset of the name in the file.
    pub offset: u64,
}

impl Locator {
    pub(crate) fn decode(entry: &[u8; LOCATOR_BYTES]) -> Self {
        Self {
            code: u32_at(entry, 0).to_be_bytes(),
            space: u32_at(entry, 4),
            length: u32_at(entry, 8),
            offset: u64_at(entry, 16),
        }
    }

    pub(crate) fn encode(&self) -> [u8; LOCATOR_BYTES] {
        let mut entry = [0; LOCATOR_BYTES];
        put(&mut entry, 0, &self.code);
        put(&mut entry, 4, &self.space.to_be_bytes());
        put(&mut entry, 8, &self.length.to_be_bytes());
        put(&mut entry, 16, &self.offset.to_be_bytes());
        entry
    }

    /// Bytes that the name takes, whole sectors. The space is not taken at its word: read in the wrong unit it would hold the
    /// table as well.
    #[must_use]
    pub fn taken(&self) -> u64 {
        u64::from(self.length).next_multiple_of(SECTOR)
    }
}
