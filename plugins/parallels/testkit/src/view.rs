//! What an image says, from its bytes.

use crate::{le32, le64, sectors, Variant, OPEN};
use instar_testkit::padded;
use std::collections::{BTreeMap, BTreeSet};

/// An image, taken apart.
pub struct View<'a> {
    /// The file.
    pub bytes: &'a [u8],
    /// Bytes of the disk.
    pub size: usize,
    /// Bytes of a cluster.
    pub cluster: usize,
    /// Where the BAT ends.
    pub bat_end: usize,
    /// Where the data begins.
    pub data: usize,
    /// Where the clusters that it holds lie, by their number.
    pub places: BTreeMap<usize, usize>,
}

impl<'a> View<'a> {
    /// Read header and BAT. Panics if the bytes are no image.
    pub fn new(bytes: &'a [u8]) -> Self {
        let newer = bytes.starts_with(Variant::Clusters.magic());
        assert!((newer || bytes.starts_with(Variant::Sectors.magic())) && le32(bytes, 16) == 2, "no Parallels image");
        let cluster = le32(bytes, 28) as usize * 512;
        let (entries, said) = (le32(bytes, 32) as usize, le32(bytes, 48) as usize * 512);
        let bat_end = 64 + entries * 4;
        let unit = if newer { cluster } else { 512 };
        let entries = (0..entries).map(|index| (index, le32(bytes, 64 + index * 4) as usize * unit));
        Self {
            bytes,
            size: sectors(bytes) as usize * 512,
            cluster,
            bat_end,
            data: if said == 0 { bat_end.next_multiple_of(512) } else { said },
            places: entries.filter(|(_, place)| *place != 0).collect(),
        }
    }

    /// How many clusters of the disk it holds.
    pub fn held(&self) -> usize {
        self.places.len()
    }

    /// It was not closed.
    pub fn is_open(&self) -> bool {
        le32(self.bytes, 44) == OPEN
    }

    /// Whether it has a format extension.
    pub fn has_extension(&self) -> bool {
        le64(self.bytes, 56) != 0
    }

    /// What a guest reads, over the bytes that are below.
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        let mut content = padded(below, self.size);
        for (cluster, place) in &self.places {
            let start = (cluster * self.cluster).min(self.size);
            let part = &mut content[start..(start + self.cluster).min(self.size)];
            part.copy_from_slice(&self.bytes[*place..place + part.len()]);
        }
        content
    }

    /// The specification's demands on entries, and QEMU's: each names a cluster of its own, behind the start of the data and at
    /// a whole number of clusters from there, that lies in the file as a whole.
    pub fn assert_consistent(&self) {
        let mut used = BTreeSet::new();
        assert!(self.data >= self.bat_end, "the data begins within the BAT");
        assert!(self.bytes.len() >= self.data, "the file ends before the data");
        assert!(self.bat_end - 64 >= self.size.div_ceil(self.cluster) * 4, "the BAT is too short");
        for (cluster, place) in &self.places {
            assert!(*place >= self.data && (place - self.data).is_multiple_of(self.cluster), "{cluster} is at {place}");
            assert!(place + self.cluster <= self.bytes.len(), "{cluster} at {place} goes past the end");
            assert!(used.insert(*place), "{place} is used twice");
        }
        assert!(le32(self.bytes, 52) & 1 == 0 || self.places.is_empty(), "it says that it is empty");
    }

    /// Nothing is left to do: it was closed, and no extension says something that is wrong.
    pub fn assert_closed(&self) {
        self.assert_consistent();
        assert!(!self.is_open(), "it was not closed");
    }
}
