//! Reads headers, refcounts and mappings of qcow2 images, straight from the specification.

use super::{be32, be64};

/// Bits 9 to 55 of an entry: the host offset.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An image, and what its header says.
pub struct View<'a> {
    /// The file.
    pub bytes: &'a [u8],
    /// Binary logarithm of the cluster size in bytes.
    pub bits: u32,
    /// Bytes of a cluster.
    pub size: u64,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// The data file, where clusters stand in one.
    pub data: Option<&'a [u8]>,
}

impl<'a> View<'a> {
    /// Look at the header. Panics if the bytes are no image.
    pub fn new(bytes: &'a [u8]) -> Self {
        assert_eq!(&bytes[..4], b"QFI\xfb");
        let bits = be32(bytes, 20);
        Self { bytes, bits, size: 1 << bits, virtual_size: be64(bytes, 24), data: None }
    }

    pub(crate) fn entry(&self, at: u64) -> u64 {
        let at = at as usize;
        let mut raw = [0; 8];
        for (i, byte) in raw.iter_mut().enumerate() {
            *byte = self.bytes.get(at + i).copied().unwrap_or(0);
        }
        u64::from_be_bytes(raw)
    }

    /// Binary logarithm of the bits of a refcount.
    pub fn refcount_order(&self) -> u32 {
        if be32(self.bytes, 4) == 3 {
            be32(self.bytes, 96)
        } else {
            4
        }
    }

    /// Refcount of a cluster as the tables say.
    pub fn refcount(&self, cluster: u64) -> u64 {
        let per_block = (self.size * 8) >> self.refcount_order();
        let table = be64(self.bytes, 48);
        let length = u64::from(be32(self.bytes, 56)) << self.bits;
        if cluster / per_block * 8 >= length {
            return 0;
        }
        let block = self.entry(table + cluster / per_block * 8);
        if block == 0 {
            return 0;
        }
        let bits = 1u64 << self.refcount_order();
        let first = cluster % per_block * bits;
        let byte = |at: u64| u64::from(self.bytes.get((block + at) as usize).copied().unwrap_or(0));
        if bits < 8 {
            return (byte(first / 8) >> (first % 8)) & ((1 << bits) - 1);
        }
        (0..bits / 8).fold(0, |value, i| value << 8 | byte(first / 8 + i))
    }

    /// First byte and end of a compressed cluster.
    pub fn compressed(&self, entry: u64) -> (u64, u64) {
        let x = 62 - (self.bits - 8);
        let first = entry & ((1 << x) - 1);
        let sectors = (entry & ((1 << 62) - 1)) >> x;
        (first, (first / 512 + sectors + 1) * 512)
    }

    /// Whether clusters stand in a data file.
    pub fn outside(&self) -> bool {
        be32(self.bytes, 4) == 3 && be64(self.bytes, 72) & 4 != 0
    }

    /// Whether L2 entries have 16 bytes.
    pub fn extended(&self) -> bool {
        be32(self.bytes, 4) == 3 && be64(self.bytes, 72) & 16 != 0
    }

    /// Every L2 entry that is not 0: guest cluster, entry, and its bitmap. A standard entry gets the bitmap that means
    /// the same.
    pub fn entries(&self) -> Vec<(u64, u64, u64)> {
        self.entries_of(be64(self.bytes, 40), u64::from(be32(self.bytes, 36)))
    }

    /// The same below another L1 table.
    pub fn entries_of(&self, l1: u64, l1_entries: u64) -> Vec<(u64, u64, u64)> {
        let width = if self.extended() { 16 } else { 8 };
        let per_table = self.size / width;
        let mut all = Vec::new();
        for index in 0..l1_entries {
            let table = self.entry(l1 + index * 8) & OFFSET;
            if table == 0 {
                continue;
            }
            for i in 0..per_table {
                let entry = self.entry(table + i * width);
                let bitmap = match (width, entry & OFFSET) {
                    (16, _) => self.entry(table + i * width + 8),
                    _ if entry & 1 != 0 => 0xffff_ffff << 32,
                    (_, 0) if !self.outside() || entry >> 63 == 0 => 0,
                    _ => 0xffff_ffff,
                };
                if entry != 0 || bitmap != 0 {
                    all.push((index * per_table + i, entry, bitmap));
                }
            }
        }
        all
    }
}
