//! What an image says, from its bytes.

use crate::{le32, le64};
use instar_testkit::{copy_padded, padded};
use std::collections::BTreeSet;

/// An image, taken apart.
pub struct View<'a> {
    /// The file.
    pub bytes: &'a [u8],
    /// Bytes of the disk.
    pub size: usize,
    /// Bytes of a block.
    pub block: usize,
    /// Bytes in front of each block.
    pub extra: usize,
    /// Where the data begins.
    pub data: usize,
    /// Entries of the map, all that count.
    pub entries: Vec<usize>,
}

impl<'a> View<'a> {
    /// Read header and map. Panics if the bytes are no image.
    pub fn new(bytes: &'a [u8]) -> Self {
        assert_eq!((le32(bytes, 64), le32(bytes, 68)), (0xbeda_107f, 0x0001_0001), "no VDI");
        let (map, count) = (le32(bytes, 340), le32(bytes, 384));
        Self {
            bytes,
            // QEMU takes an odd size for the next multiple of 512.
            size: le64(bytes, 368).next_multiple_of(512) as usize,
            block: le32(bytes, 376),
            extra: le32(bytes, 380),
            data: le32(bytes, 344),
            entries: (0..count).map(|index| le32(bytes, map + index * 4)).collect(),
        }
    }

    fn uuid(&self, at: usize) -> [u8; 16] {
        self.bytes[at..at + 16].try_into().unwrap()
    }

    /// `uuidCreate` and `uuidModify`.
    pub fn identity(&self) -> [[u8; 16]; 2] {
        [self.uuid(392), self.uuid(408)]
    }

    /// What its parent's are, as it says; null without one.
    pub fn parent(&self) -> [[u8; 16]; 2] {
        [self.uuid(424), self.uuid(440)]
    }

    /// The parent is yet to get that.
    pub fn announced(&self) -> bool {
        le32(self.bytes, 364) >> 31 == 1
    }

    /// Whether the engine takes the other image for this one's parent.
    pub fn goes_with(&self, parent: &View<'_>) -> bool {
        let [create, modify] = parent.identity();
        let next = instar_vdi_format::Uuid(modify).next(&self.identity().concat()).0;
        self.parent() == [create, modify] || self.announced() && self.parent() == [create, next]
    }

    /// `cBlocksAllocated`.
    pub fn allocated(&self) -> usize {
        le32(self.bytes, 388)
    }

    fn slots(&self) -> impl Iterator<Item = usize> + '_ {
        self.entries.iter().copied().filter(|&entry| entry < 0xffff_fffe)
    }

    /// How many blocks it holds, zeroes included.
    pub fn held(&self) -> usize {
        self.entries.iter().filter(|&&entry| entry != 0xffff_ffff).count()
    }

    /// What a guest reads, over the bytes that are below.
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        let mut content = padded(below, self.size);
        for (place, entry) in content.chunks_mut(self.block).zip(&self.entries) {
            match entry {
                0xffff_ffff => {}
                0xffff_fffe => place.fill(0),
                slot => {
                    let at = self.data + slot * (self.block + self.extra) + self.extra;
                    copy_padded(place, self.bytes.get(at..).unwrap_or_default());
                }
            }
        }
        content
    }

    /// Every entry names a slot of its own inside the file, and no program would give one of them out again.
    pub fn assert_consistent(&self) {
        let mut used = BTreeSet::new();
        for slot in self.slots() {
            assert!(used.insert(slot), "slot {slot} is used twice");
            assert!(self.data + slot * (self.block + self.extra) < self.bytes.len(), "slot {slot} is past the end");
            assert!(slot < self.allocated(), "slot {slot} would be given out again: {}", self.allocated());
        }
    }

    /// What counts as a slot lies in the file: otherwise the next block of another program leaves a hole before it.
    pub fn assert_within_file(&self) {
        let end = self.data + self.allocated() * (self.block + self.extra);
        assert!(end <= self.bytes.len(), "the last of {} slots is not in the file as a whole", self.allocated());
    }

    /// What VirtualBox looks at when it opens an image, and what every writer but this one relies on: slots without gaps, all
    /// of them within the file.
    pub fn assert_tidy(&self) {
        self.assert_consistent();
        assert_eq!(self.slots().count(), self.allocated(), "there are gaps between the slots");
        assert!(self.allocated() <= self.entries.len(), "more slots than blocks");
        assert!(self.data >= le32(self.bytes, 340) + self.entries.len() * 4, "the data begins within the map");
        self.assert_within_file();
        assert!(self.identity().iter().all(|uuid| *uuid != [0; 16]));
    }
}
