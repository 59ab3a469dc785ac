//! What an image says, from its bytes.

use crate::be64;
use instar_testkit::padded;
use miniz_oxide::inflate::decompress_to_vec_with_limit;
use std::collections::BTreeMap;

/// An image, taken apart.
pub struct View<'a> {
    /// The file.
    pub bytes: &'a [u8],
    /// Bytes of the disk.
    pub size: usize,
    /// Bytes of a cluster.
    pub cluster: usize,
    /// Where the L1 table lies.
    pub l1: std::ops::Range<usize>,
    /// Where the L2 tables lie.
    pub tables: Vec<std::ops::Range<usize>>,
    /// Entries of clusters that are not 0, by the cluster's number.
    pub entries: BTreeMap<usize, u64>,
}

impl<'a> View<'a> {
    /// Read header and tables. Panics if the bytes are no image.
    pub fn new(bytes: &'a [u8]) -> Self {
        assert_eq!(&bytes[..8], b"QFI\xfb\0\0\0\x01", "no qcow");
        let (size, cluster, entries) = (be64(bytes, 24) as usize, 1usize << bytes[32], 1usize << bytes[33]);
        let l1 = be64(bytes, 40) as usize;
        let l1 = l1..l1 + size.div_ceil(cluster * entries) * 8;
        let (mut tables, mut found) = (Vec::new(), BTreeMap::new());
        for (index, at) in l1.clone().step_by(8).enumerate() {
            let table = be64(bytes, at) as usize;
            if table != 0 {
                tables.push(table..table + entries * 8);
                let all = (0..entries).map(|entry| (index * entries + entry, be64(bytes, table + entry * 8)));
                found.extend(all.filter(|(_, number)| *number != 0));
            }
        }
        Self { bytes, size: size - size % 512, cluster, l1, tables, entries: found }
    }

    /// How many clusters it holds.
    pub fn held(&self) -> usize {
        self.entries.len()
    }

    /// Where the data of an entry lies, and whether it is compressed.
    fn place(&self, number: u64) -> (std::ops::Range<usize>, bool) {
        let bits = self.cluster.trailing_zeros();
        if number >> 63 == 0 {
            return (number as usize..number as usize + self.cluster, false);
        }
        let shift = 63 - bits;
        let at = (number & ((1 << shift) - 1)) as usize;
        (at..at + ((number >> shift) as usize & (self.cluster - 1)), true)
    }

    /// The bytes of a cluster that is held.
    fn cluster_bytes(&self, number: u64) -> Vec<u8> {
        let (range, packed) = self.place(number);
        let bytes = padded(self.bytes.get(range.start..).unwrap_or_default(), range.len());
        if packed {
            let bytes = decompress_to_vec_with_limit(&bytes, self.cluster).expect("a stream that decodes");
            assert_eq!(bytes.len(), self.cluster);
            return bytes;
        }
        bytes
    }

    /// What a guest reads, over the bytes that are below.
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        let mut content = padded(below, self.size);
        for (cluster, number) in &self.entries {
            let start = (cluster * self.cluster).min(self.size);
            let place = &mut content[start..(start + self.cluster).min(self.size)];
            let bytes = self.cluster_bytes(*number);
            place.copy_from_slice(&bytes[..place.len()]);
        }
        content
    }

    /// Every entry names something inside the file, and nothing but streams shares a byte with anything else.
    pub fn assert_consistent(&self) {
        let name = be64(self.bytes, 8) as usize;
        let name = name..name + (be64(self.bytes, 12) & 0xffff_ffff) as usize;
        let mut used = vec![(0..48, false), (self.l1.clone(), false), (name, false)];
        used.extend(self.tables.iter().map(|table| (table.clone(), false)));
        used.extend(self.entries.values().map(|number| self.place(*number)));
        used.retain(|(range, _)| !range.is_empty());
        used.sort_by_key(|(range, _)| (range.start, range.end));
        let mut end = (0, false);
        for (range, stream) in used {
            assert!(range.start < self.bytes.len(), "{range:?} is past the end of {}", self.bytes.len());
            assert!(range.start >= end.0 || stream && end.1, "{range:?} begins before {end:?}");
            end = end.max((range.end, stream));
        }
        for table in &self.tables {
            assert!(table.end <= self.bytes.len() && table.start.is_multiple_of(self.cluster), "{table:?}");
        }
    }

    /// What is used ends where the file ends: another program puts the next cluster there.
    pub fn assert_whole(&self) {
        self.assert_consistent();
        let ends = self.entries.values().map(|number| self.place(*number).0.end);
        assert!(ends.max().unwrap_or(0) <= self.bytes.len(), "the last cluster is not in the file as a whole");
    }
}
