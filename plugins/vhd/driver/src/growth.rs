//! How a disk will grow: planned before anything changes.

use crate::batmap::counted_bytes;
use crate::image::Image;
use instar_vhd_format::{BATMAP_HEADER_BYTES, SECTOR};

/// How a disk will grow.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// Its new size in bytes, whole sectors.
    pub size: u64,
    /// Entries of the table that has to be moved to have room for them.
    pub moved: Option<u32>,
}

impl Growth {
    /// Bytes that a table that is moved takes, with the batmap that stands behind it.
    pub fn new_bytes(&self, image: &Image) -> u64 {
        let Some(entries) = self.moved else { return 0 };
        let table = (u64::from(entries) * 4).next_multiple_of(SECTOR);
        let map = counted_bytes(self.size, image.header.block_size());
        table + image.batmap.as_ref().map_or(0, |_| BATMAP_HEADER_BYTES as u64 + map)
    }
}
