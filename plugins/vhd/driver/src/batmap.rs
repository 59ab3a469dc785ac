//! XenServer's batmap in memory: which blocks hold all of their sectors, so that their bitmaps need not be read.
//!
//! A map whose checksum is wrong is not believed: the bitmaps say the same. So a crash between the two writes that change map
//! and checksum does no harm.

use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, BlockIo, DriverResult, OrderedWriter};
use instar_vhd_format::{BatmapHeader, MapSum, BATMAP_HEADER_BYTES, SECTOR};

/// A batmap.
#[derive(Debug)]
pub struct Batmap {
    pub header: BatmapHeader,
    /// Byte offset of the header.
    pub header_place: u64,
    /// The bits of the disk's blocks, whole sectors; nothing if they are not to be believed.
    map: Vec<u8>,
    /// The checksum is right.
    pub valid: bool,
    /// No bit of it is set in the file.
    pub blank: bool,
}

/// Bytes of the map that count for the checksum (`vhd_checksum_batmap`): of the disk's whole blocks, in whole sectors.
pub fn counted_bytes(size: u64, block_size: u64) -> u64 {
    (size / block_size / 8).div_ceil(SECTOR).max(1) * SECTOR
}

impl Batmap {
    /// The batmap whose header stands at byte `header_place`, and whose map begins with these bytes. If they are not to be
    /// `kept` in memory, the bitmaps are read.
    pub fn new(header: BatmapHeader, header_place: u64, map: Vec<u8>, kept: bool) -> Self {
        let mut sum = MapSum::default();
        sum.add(&map);
        let (valid, blank) = (header.goes_with(sum), map.iter().all(|&byte| byte == 0));
        let map = if valid && kept { map } else { Vec::new() };
        Self { header, header_place, map, valid, blank }
    }

    /// Whether every sector of a block that is there is in it, without a look at its bitmap.
    pub fn is_full(&self, block: u64) -> bool {
        let byte = usize::try_from(block / 8).ok().and_then(|byte| self.map.get(byte));
        byte.is_some_and(|byte| byte & (0x80 >> (block % 8)) != 0)
    }

    /// Take back what the map says of blocks for which `is_there` is not true. Returns whether that changed anything.
    pub fn keep(&mut self, is_there: impl Fn(u64) -> bool) -> bool {
        let mut changed = false;
        for (index, byte) in (0u64..).zip(&mut self.map).filter(|(_, byte)| **byte != 0) {
            for bit in 0..8u64 {
                let mask = 0x80 >> bit;
                if *byte & mask != 0 && !is_there(index * 8 + bit) {
                    *byte &= !mask;
                    changed = true;
                }
            }
        }
        changed
    }

    /// Have the map say nothing.
    pub fn clear(&mut self) {
        self.map = Vec::new();
    }

    /// Write map and header. Until both are there, the checksum is wrong: then the map is not believed, and the bitmaps count.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        let mut sum = MapSum::default();
        sum.add(&self.map);
        self.header = self.header.with_checksum(sum);
        let header = self.header.encode();
        // All of it: what was not believed is not in memory.
        let mut requests = vec![Request::zero(out.device(), self.header.offset(), self.header.map_bytes())];
        if !self.map.is_empty() {
            let (map, length) = (self.map.as_ptr() as u64, self.map.len() as u64);
            requests.push(Request::write(out.device(), self.header.offset(), map, length));
        }
        requests.push(Request::write(out.device(), self.header_place, header.as_ptr() as u64, header.len() as u64));
        (self.valid, self.blank) = (true, self.map.iter().all(|&byte| byte == 0));
        out.run(io, &mut requests)
    }

    /// The same bits at another place: the header at byte `place`, the map of `bytes` bytes behind it.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn moved(&mut self, place: u64, bytes: u64) -> DriverResult<()> {
        let sectors = u32::try_from(bytes / SECTOR).map_err(|_| overflow("the batmap"))?;
        self.header = self.header.with_map(place.saturating_add(BATMAP_HEADER_BYTES as u64), sectors);
        self.header_place = place;
        Ok(())
    }
}
