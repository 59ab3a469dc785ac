//! XenServer's batmap (blktap, `vhd/include/vhd.h` and `vhd/lib/libvhd.c`): a bit for each block, set if every sector of the
//! block is there. It stands behind the block allocation table; without it, the blocks' own bitmaps say the same.

use crate::footer::{creators, Footer, Kind};
use crate::{put, u32_at, u64_at, SECTOR};

/// Bytes of the header.
pub const BATMAP_HEADER_BYTES: usize = 512;

const COOKIE: [u8; 8] = *b"tdbatmap";
const CHECKSUM: usize = 24;
/// The first byte of what is kept of the key of an encrypted image.
const KEY: usize = 29;
/// `VHD_BATMAP_VERSION(1, 1)`, whose checksum takes bytes as signed numbers, and the current one.
const SIGNED: u32 = 0x0001_0001;
const CURRENT: u32 = 0x0001_0002;

/// The header of a batmap, with all of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatmapHeader {
    bytes: [u8; BATMAP_HEADER_BYTES],
}

impl BatmapHeader {
    /// Whether an image with this footer has a batmap, or (XenServer 1.1) may have one: its header stands behind the table.
    #[must_use]
    pub fn is_expected(footer: &Footer) -> bool {
        footer.kind() != Kind::Fixed && footer.creator() == creators::XEN && footer.creator_version() > 1
    }

    /// Take a header apart; `None` if there is none, or one of a version that is not known.
    #[must_use]
    pub fn parse(bytes: &[u8; BATMAP_HEADER_BYTES]) -> Option<Self> {
        let header = Self { bytes: *bytes };
        (bytes[..8] == COOKIE && header.version() <= CURRENT).then_some(header)
    }

    /// A new header for a map of `sectors` sectors at byte `offset`.
    #[must_use]
    pub fn new(offset: u64, sectors: u32) -> Self {
        let mut bytes = [0; BATMAP_HEADER_BYTES];
        put(&mut bytes, 0, &COOKIE);
        put(&mut bytes, 20, &CURRENT.to_be_bytes());
        Self { bytes }.with_map(offset, sectors)
    }

    /// The same header for a map of `sectors` sectors at byte `offset`; the checksum is that of an empty one.
    #[must_use]
    pub fn with_map(mut self, offset: u64, sectors: u32) -> Self {
        put(&mut self.bytes, 8, &offset.to_be_bytes());
        put(&mut self.bytes, 16, &sectors.to_be_bytes());
        self.with_checksum(MapSum::default())
    }

    /// The same header for a map with this sum.
    #[must_use]
    pub fn with_checksum(mut self, sum: MapSum) -> Self {
        let checksum = sum.checksum(self.version());
        put(&mut self.bytes, CHECKSUM, &checksum.to_be_bytes());
        self
    }

    /// Its bytes.
    #[must_use]
    pub const fn encode(&self) -> [u8; BATMAP_HEADER_BYTES] {
        self.bytes
    }

    fn version(&self) -> u32 {
        u32_at(&self.bytes, 20)
    }

    /// Byte offset of the map.
    #[must_use]
    pub fn offset(&self) -> u64 {
        u64_at(&self.bytes, 8)
    }

    /// Bytes of the map.
    #[must_use]
    pub fn map_bytes(&self) -> u64 {
        u64::from(u32_at(&self.bytes, 16)) * SECTOR
    }

    /// Whether a map with this sum is the one that the header goes with.
    #[must_use]
    pub fn goes_with(&self, sum: MapSum) -> bool {
        u32_at(&self.bytes, CHECKSUM) == sum.checksum(self.version())
    }

    /// Whether the blocks are encrypted: XenServer keeps a hash of the key.
    #[must_use]
    pub const fn is_encrypted(&self) -> bool {
        self.bytes[KEY] != 0
    }
}

/// The sum of the bytes of a map, which may be gone through in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapSum {
    sum: u32,
    /// Bytes whose highest bit is set: each counts 256 less as a signed number.
    negative: u32,
}

impl MapSum {
    /// Add the next bytes of the map.
    pub fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.sum = self.sum.wrapping_add(u32::from(byte));
            self.negative = self.negative.wrapping_add(u32::from(byte >> 7));
        }
    }

    const fn checksum(self, version: u32) -> u32 {
        if version == SIGNED {
            !self.sum.wrapping_sub(self.negative.wrapping_mul(256))
        } else {
            !self.sum
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_can_be_read() {
        let mut sum = MapSum::default();
        sum.add(&[0xff, 0x80, 1]);
        let header = BatmapHeader::new(4096, 2).with_checksum(sum);
        assert_eq!(BatmapHeader::parse(&header.encode()), Some(header));
        assert_eq!((header.offset(), header.map_bytes(), header.is_encrypted()), (4096, 1024, false));
        assert!(header.goes_with(sum) && !header.goes_with(MapSum::default()));
        assert!(header.with_map(8192, 3).goes_with(MapSum::default()));
        let mut bytes = header.encode();
        bytes[23] = 1;
        bytes[24..28].copy_from_slice(&(!(-1i32 - 128 + 1)).to_be_bytes());
        assert!(BatmapHeader::parse(&bytes).unwrap().goes_with(sum), "bytes with a sign");
        bytes[23] = 9;
        assert_eq!(BatmapHeader::parse(&bytes), None);
        assert_eq!(BatmapHeader::parse(&[0; 512]), None);
    }
}
