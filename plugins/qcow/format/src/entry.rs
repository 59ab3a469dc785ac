//! Entries of an L2 table (`get_cluster_offset`).

/// Bytes of an entry, of either kind of table.
pub const ENTRY_BYTES: u64 = 8;
/// The cluster is compressed (`QCOW_OFLAG_COMPRESSED`).
const COMPRESSED: u64 = 1 << 63;

/// What an image says about one cluster of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing: what lies below shows. The format has no entry for zeroes.
    Free,
    /// A cluster of plain bytes, at this byte of the file.
    Data(u64),
    /// A deflate stream.
    Compressed {
        /// Its first byte in the file, which need not begin anything.
        offset: u64,
        /// Its length in bytes, less than a cluster.
        length: u64,
    },
}

impl Entry {
    /// Decode the entry of an image with clusters of `1 << cluster_bits` bytes. Of a compressed cluster the length stands
    /// above the offset, in as many bits as a cluster has (`decompress_cluster`).
    #[must_use]
    pub const fn decode(number: u64, cluster_bits: u32) -> Self {
        if number == 0 {
            return Self::Free;
        }
        if number & COMPRESSED == 0 {
            return Self::Data(number);
        }
        let shift = 63 - cluster_bits;
        let length = (number >> shift) & ((1 << cluster_bits) - 1);
        Self::Compressed { offset: number & ((1 << shift) - 1), length }
    }

    /// Encode the entry, with the fields of a compressed one in their ranges.
    #[must_use]
    pub const fn encode(self, cluster_bits: u32) -> u64 {
        match self {
            Self::Free => 0,
            Self::Data(offset) => offset,
            Self::Compressed { offset, length } => COMPRESSED | length << (63 - cluster_bits) | offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_told() {
        assert_eq!(Entry::decode(0, 12), Entry::Free);
        assert_eq!(Entry::decode(0x7000, 12), Entry::Data(0x7000));
        let compressed = Entry::Compressed { offset: 0x1_2345, length: 0x6f };
        assert_eq!(compressed.encode(9), 1 << 63 | 0x6f << 54 | 0x1_2345);
        for bits in 9..=16 {
            for entry in [Entry::Free, Entry::Data(1 << bits), compressed] {
                assert_eq!(Entry::decode(entry.encode(bits), bits), entry);
            }
            assert_eq!(Entry::decode(u64::MAX, bits).encode(bits), u64::MAX);
        }
    }
}
