//! The dynamic header ("Dynamic Disk Header Format"): where the block allocation table is, and who the parent is.

use crate::checksum::checksum;
use crate::locator::{Locator, LOCATOR_BYTES};
use crate::{put, u32_at, u64_at, FormatError, Parent, SECTOR};
use alloc::format;

/// Bytes of a dynamic header.
pub const HEADER_BYTES: usize = 1024;
/// Parent locators of a header.
pub const LOCATORS: usize = 8;
/// The entry of the block allocation table of a block that is not there.
pub const UNUSED: u32 = u32::MAX;

const COOKIE: [u8; 8] = *b"cxsparse";
const VERSION: u32 = 0x0001_0000;
const TABLE_OFFSET: usize = 16;
const ENTRIES: usize = 28;
const BLOCK_SIZE: usize = 32;
const CHECKSUM: usize = 36;
const PARENT_ID: usize = 40;
const PARENT_NAME: usize = 64;
const PARENT_NAME_BYTES: usize = 512;
const LOCATOR_TABLE: usize = 576;
/// Sectors of the file that a sector of the bitmap stands for.
const SECTORS_OF_BITMAP: u64 = 512 * 8;

/// A dynamic header, with all of its bytes: what this library does not know is kept when it is written again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; HEADER_BYTES],
}

impl Header {
    /// Take a header apart.
    ///
    /// # Errors
    /// A clause about the field that cannot be taken.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..8] != COOKIE {
            return Err(FormatError::corrupt("the dynamic header is not there (its cookie is wrong)"));
        }
        if u32_at(bytes, CHECKSUM) != checksum(bytes, CHECKSUM) {
            return Err(FormatError::corrupt("the checksum of the dynamic header is wrong"));
        }
        let (header, version) = (Self { bytes: *bytes }, u32_at(bytes, 24));
        if version != VERSION {
            return Err(FormatError::unsupported(format!("version {version:#x} of the dynamic header is not known")));
        }
        let block = header.block_size();
        if !block.is_power_of_two() || block < SECTOR {
            let text = format!("the block size of {block} bytes is not a power of two of at least {SECTOR}");
            return Err(FormatError::corrupt(text));
        }
        if !header.table_offset().is_multiple_of(SECTOR) {
            let text = format!("the block allocation table at byte {} is not at a sector", header.table_offset());
            return Err(FormatError::corrupt(text));
        }
        Ok(header)
    }

    /// A new header with a table of `entries` entries at byte `table_offset`, for blocks of `block_size` bytes.
    #[must_use]
    pub fn new(table_offset: u64, entries: u32, block_size: u32) -> Self {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, 0, &COOKIE);
        put(&mut bytes, 8, &u64::MAX.to_be_bytes());
        put(&mut bytes, 24, &VERSION.to_be_bytes());
        put(&mut bytes, BLOCK_SIZE, &block_size.to_be_bytes());
        Self { bytes }.with_table(table_offset, entries)
    }

    /// The same header with another table. Only bytes of the first 512 change.
    #[must_use]
    pub fn with_table(mut self, table_offset: u64, entries: u32) -> Self {
        put(&mut self.bytes, TABLE_OFFSET, &table_offset.to_be_bytes());
        put(&mut self.bytes, ENTRIES, &entries.to_be_bytes());
        self.summed()
    }

    /// The same header of a child of this parent, whose names stand where the locators say. The time of the parent's last
    /// change, which changes with every merge into it, is left out as Hyper-V does.
    #[must_use]
    pub fn with_parent(mut self, parent: &Parent, locators: &[Locator]) -> Self {
        self.bytes[PARENT_ID..LOCATOR_TABLE + LOCATORS * LOCATOR_BYTES].fill(0);
        put(&mut self.bytes, PARENT_ID, &parent.id);
        let name = parent.base_name().encode_utf16();
        for (unit, at) in name.take(PARENT_NAME_BYTES / 2).zip((PARENT_NAME..).step_by(2)) {
            put(&mut self.bytes, at, &unit.to_be_bytes());
        }
        for (locator, at) in locators.iter().take(LOCATORS).zip((LOCATOR_TABLE..).step_by(LOCATOR_BYTES)) {
            put(&mut self.bytes, at, &locator.encode());
        }
        self.summed()
    }

    fn summed(mut self) -> Self {
        let sum = checksum(&self.bytes, CHECKSUM);
        put(&mut self.bytes, CHECKSUM, &sum.to_be_bytes());
        self
    }

    /// Its bytes.
    #[must_use]
    pub const fn encode(&self) -> [u8; HEADER_BYTES] {
        self.bytes
    }

    /// "Table Offset": byte offset of the block allocation table, at a sector.
    #[must_use]
    pub fn table_offset(&self) -> u64 {
        u64_at(&self.bytes, TABLE_OFFSET)
    }

    /// "Max Table Entries", which may be more than the disk has blocks.
    #[must_use]
    pub fn entries(&self) -> u32 {
        u32_at(&self.bytes, ENTRIES)
    }

    /// Bytes of the table, padded to whole sectors.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        (u64::from(self.entries()) * 4).next_multiple_of(SECTOR)
    }

    /// "Block Size" in bytes, without the sector bitmap: a power of two of at least a sector.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        u64::from(u32_at(&self.bytes, BLOCK_SIZE))
    }

    /// Bytes of the sector bitmap in front of each block: "padded to a 512-byte sector boundary".
    #[must_use]
    pub fn bitmap_bytes(&self) -> u64 {
        self.block_size().div_ceil(SECTOR * SECTORS_OF_BITMAP) * SECTOR
    }

    /// Bytes that a block takes in the file, its bitmap included.
    #[must_use]
    pub fn stride(&self) -> u64 {
        self.bitmap_bytes() + self.block_size()
    }

    /// "Parent Unique ID".
    #[must_use]
    pub fn parent_id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id.copy_from_slice(&self.bytes[PARENT_ID..PARENT_ID + 16]);
        id
    }

    /// "Parent Unicode Name": its units up to the first that is zero.
    pub fn parent_name(&self) -> impl Iterator<Item = u16> + '_ {
        let field = &self.bytes[PARENT_NAME..PARENT_NAME + PARENT_NAME_BYTES];
        field.chunks_exact(2).map(|unit| u16::from_be_bytes([unit[0], unit[1]])).take_while(|&unit| unit != 0)
    }

    /// The parent locators that are in use.
    pub fn locators(&self) -> impl Iterator<Item = Locator> + '_ {
        let table = self.bytes[LOCATOR_TABLE..].chunks_exact(LOCATOR_BYTES).take(LOCATORS);
        table.filter_map(|entry| entry.first_chunk().map(Locator::decode)).filter(|locator| locator.code != [0; 4])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::codes;

    #[test]
    fn what_is_made_can_be_read() {
        let name: alloc::vec::Vec<u16> = "größe.vhd".encode_utf16().collect();
        let locator = Locator { code: codes::W2RU, space: 512, length: 20, offset: 2048 };
        let parent = |id, path: &str| Parent { id: [id; 16], path: path.into() };
        let other = Header::new(1536, 100, 2 << 20).with_parent(&parent(8, "another one"), &[locator, locator]);
        let header = other.with_parent(&parent(9, "../sub/größe.vhd"), &[locator]);
        assert_eq!(Header::parse(&header.encode()), Ok(header));
        assert_eq!((header.table_offset(), header.entries(), header.table_bytes()), (1536, 100, 512));
        assert_eq!((header.block_size(), header.bitmap_bytes(), header.stride()), (2 << 20, 512, (2 << 20) + 512));
        assert_eq!((header.parent_id(), header.parent_name().collect::<alloc::vec::Vec<_>>()), ([9; 16], name));
        assert_eq!(header.locators().collect::<alloc::vec::Vec<_>>(), [locator]);
        let moved = header.with_table(1 << 20, 1000);
        assert_eq!((moved.table_offset(), moved.entries(), moved.table_bytes()), (1 << 20, 1000, 4096));
        assert_eq!(moved.encode()[512..], header.encode()[512..], "one sector changes");
    }

    #[test]
    fn bitmaps_have_whole_sectors() {
        for (block, bytes) in [(512, 512), (4096, 512), (2 << 20, 512), (4 << 20, 1024), (1 << 31, 512 << 10)] {
            assert_eq!(Header::new(1536, 1, block).bitmap_bytes(), bytes, "{block}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = Header::new(1536, 100, 2 << 20);
        let refused = |header: Header| Header::parse(&header.encode()).unwrap_err().text;
        assert!(refused(Header::new(1536, 1, 3 << 20)).contains("power of two"));
        assert!(refused(Header::new(1536, 1, 256)).contains("power of two"));
        assert!(refused(good.with_table(1537, 1)).contains("not at a sector"));
        let mut bytes = good.encode();
        bytes[1000] = 1;
        assert!(Header::parse(&bytes).unwrap_err().text.contains("checksum"));
        bytes[0] = 0;
        assert!(Header::parse(&bytes).unwrap_err().text.contains("cookie"));
    }
}
