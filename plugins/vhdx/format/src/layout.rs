//! Which entry of the block allocation table, and which bit of which bitmap, a byte of the disk has (2.4, 2.5).

use crate::Metadata;

/// Logical sectors that a sector bitmap block speaks of.
const CHUNK_SECTORS: u64 = 1 << 23;
/// Bytes of a page, of which bitmaps are read and logged.
const PAGE: u64 = 4096;

/// The geometry of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of a payload block.
    pub block_size: u64,
    /// Bytes of a logical sector.
    pub sector: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// There are sector bitmaps.
    pub has_parent: bool,
}

impl Layout {
    /// That of a disk.
    #[must_use]
    pub const fn of(metadata: &Metadata) -> Self {
        let Metadata { block_size, logical_sector: sector, size, has_parent, .. } = *metadata;
        Self { block_size, sector, size, has_parent }
    }

    /// Payload blocks of the disk.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size)
    }

    /// Payload blocks for each sector bitmap block: a power of two.
    #[must_use]
    pub const fn chunk_ratio(&self) -> u64 {
        // At least 2^23 · 512 / 256 MiB = 16.
        CHUNK_SECTORS * self.sector / self.block_size
    }

    /// Entries of the table that the disk needs.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        let (blocks, ratio) = (self.blocks(), self.chunk_ratio());
        if self.has_parent {
            blocks.div_ceil(ratio) * (ratio + 1)
        } else {
            blocks + blocks.saturating_sub(1) / ratio
        }
    }

    /// The entry of a payload block.
    #[must_use]
    pub const fn payload_entry(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio()
    }

    /// The entry of the sector bitmap block that speaks of a payload block.
    #[must_use]
    pub const fn bitmap_entry(&self, block: u64) -> u64 {
        let ratio = self.chunk_ratio();
        block / ratio * (ratio + 1) + ratio
    }

    /// What an entry is of: the payload block, or, `Err`, the first block that its sector bitmap block speaks of.
    ///
    /// # Errors
    /// No error: the entry is one of a sector bitmap block.
    pub const fn entry_of(&self, entry: u64) -> Result<u64, u64> {
        let ratio = self.chunk_ratio();
        let (chunk, within) = (entry / (ratio + 1), entry % (ratio + 1));
        if within == ratio {
            Err(chunk * ratio)
        } else {
            Ok(chunk * ratio + within)
        }
    }

    /// Guest bytes of a piece: what one page of bitmap stands for, or a whole block that is smaller.
    #[must_use]
    pub fn piece_bytes(&self) -> u64 {
        self.block_size.min(PAGE * 8 * self.sector)
    }

    /// Pieces of a block.
    #[must_use]
    pub fn pieces_per_block(&self) -> u64 {
        self.block_size / self.piece_bytes()
    }

    /// Where the bits of a piece of a block begin in the sector bitmap block, in bytes, and how many bytes they are. They lie
    /// within one page.
    #[must_use]
    pub fn bits_of_piece(&self, piece: u64) -> (u64, u64) {
        let bytes = self.piece_bytes() / self.sector / 8;
        (piece % (self.chunk_ratio() * self.pieces_per_block()) * bytes, bytes)
    }

    /// Bytes of a block that are part of the disk: the last one may reach past its end.
    #[must_use]
    pub fn visible(&self, block: u64) -> u64 {
        self.size.saturating_sub(block.saturating_mul(self.block_size)).min(self.block_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_bitmaps_follow_those_of_their_blocks() {
        let layout = Layout { block_size: 256 << 20, sector: 512, size: 33 << 28, has_parent: true };
        assert_eq!((layout.chunk_ratio(), layout.blocks(), layout.entries()), (16, 33, 51));
        assert_eq!(Layout { has_parent: false, ..layout }.entries(), 35);
        assert_eq!(Layout { has_parent: false, size: 32 << 28, ..layout }.entries(), 33);
        assert_eq!((layout.payload_entry(15), layout.bitmap_entry(15), layout.payload_entry(16)), (15, 16, 17));
        assert_eq!((layout.payload_entry(32), layout.bitmap_entry(32)), (34, 50));
        for block in 0..33 {
            assert_eq!(layout.entry_of(layout.payload_entry(block)), Ok(block));
            assert_eq!(layout.entry_of(layout.bitmap_entry(block)), Err(block / 16 * 16));
        }
    }

    #[test]
    fn a_piece_has_a_page_of_bits_at_most() {
        for (block_size, sector, pieces, bits) in
            [(1 << 20, 512, 1, 256), (1 << 20, 4096, 1, 32), (256 << 20, 512, 16, 4096), (256 << 20, 4096, 2, 4096)]
        {
            let layout = Layout { block_size, sector, size: 1 << 40, has_parent: true };
            assert_eq!((layout.pieces_per_block(), layout.bits_of_piece(1)), (pieces, (bits, bits)));
            // The bits of all pieces of a chunk fill its bitmap.
            let last = layout.chunk_ratio() * pieces - 1;
            let (at, bytes) = layout.bits_of_piece(last);
            assert_eq!((at + bytes, layout.bits_of_piece(last + 1).0), (1 << 20, 0));
        }
        let layout = Layout { block_size: 1 << 20, sector: 512, size: (1 << 20) + 512, has_parent: true };
        assert_eq!((layout.visible(0), layout.visible(1), layout.visible(2)), (1 << 20, 512, 0));
    }
}
