//! Pieces of metadata tables, read and written in batches.
//!
//! A slice is an aligned piece of a table: 4 KiB, or one cluster where clusters are smaller. The sectors of
//! a slice that nobody changed are written back as they were read, so a torn write of a slice harms nothing
//! that its changed entries would not.

use crate::image::overflow;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{get_refcount, set_refcount, RefcountOrder};

struct Slice {
    bytes: Box<[u8]>,
    dirty: bool,
}

/// Slices of one kind of table of one image, by their byte offset in the file.
pub struct SliceCache {
    device: u32,
    size: usize,
    slices: BTreeMap<u64, Slice>,
}

impl SliceCache {
    /// An empty cache of slices of `size` bytes (a power of two).
    #[must_use]
    pub fn new(device: u32, size: usize) -> Self {
        Self { device, size, slices: BTreeMap::new() }
    }

    /// The device that the slices are of.
    #[must_use]
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Size of a slice in bytes.
    #[must_use]
    pub fn slice_size(&self) -> usize {
        self.size
    }

    /// The slice that holds a byte offset.
    #[must_use]
    pub fn slice_of(&self, offset: u64) -> u64 {
        offset & !(self.size as u64 - 1)
    }

    /// Make sure that the slices of these byte offsets are there, with one batch of reads.
    ///
    /// # Errors
    /// I/O errors.
    pub fn load(&mut self, io: &mut dyn BlockIo, offsets: impl IntoIterator<Item = u64>) -> DriverResult<()> {
        let mut wanted: Vec<u64> = Vec::new();
        for offset in offsets {
            let at = self.slice_of(offset);
            if wanted.last() != Some(&at) && !self.slices.contains_key(&at) {
                wanted.push(at);
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        let mut fresh: Vec<(u64, Box<[u8]>)> =
            wanted.into_iter().map(|at| (at, vec![0; self.size].into_boxed_slice())).collect();
        let mut requests: Vec<Request> = fresh
            .iter_mut()
            .map(|(at, bytes)| Request::read(self.device, *at, bytes.as_mut_ptr() as u64, bytes.len() as u64))
            .collect();
        if !requests.is_empty() {
            io.run(&mut requests)?;
        }
        self.slices.extend(fresh.into_iter().map(|(at, bytes)| (at, Slice { bytes, dirty: false })));
        Ok(())
    }

    /// Put in an all-zero slice that is known to be zero (or free) on the device, without reading it.
    pub fn insert_zeroed(&mut self, offset: u64) {
        let at = self.slice_of(offset);
        let size = self.size;
        self.slices.entry(at).or_insert_with(|| Slice { bytes: vec![0; size].into_boxed_slice(), dirty: false });
    }

    /// Put in an all-zero slice of a new structure whose place on the device may hold anything: it is to be written.
    pub fn insert_new(&mut self, offset: u64) {
        let at = self.slice_of(offset);
        self.slices.insert(at, Slice { bytes: vec![0; self.size].into_boxed_slice(), dirty: true });
    }

    /// Put in a slice that has the bytes of another one, which was loaded, and is to be written.
    ///
    /// # Errors
    /// As [`SliceCache::entry`].
    pub fn insert_copy(&mut self, from: u64, offset: u64) -> DriverResult<()> {
        let (from, at) = (self.slice_of(from), self.slice_of(offset));
        if !self.slices.contains_key(&at) {
            let bytes = self.slices.get(&from).ok_or_else(|| overflow("the offset of a slice"))?.bytes.clone();
            self.slices.insert(at, Slice { bytes, dirty: true });
        }
        Ok(())
    }

    fn index_in(&self, offset: u64) -> usize {
        usize::try_from(offset & (self.size as u64 - 1)).unwrap_or(0)
    }

    /// The big-endian 64-bit entry at a byte offset (a multiple of 8) of a loaded slice.
    ///
    /// # Errors
    /// A bug of the driver, if the slice was not loaded.
    pub fn entry(&self, offset: u64) -> DriverResult<u64> {
        let index = self.index_in(offset);
        self.slices
            .get(&self.slice_of(offset))
            .and_then(|slice| slice.bytes.get(index..index + 8))
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_be_bytes)
            .ok_or_else(|| overflow("the offset of a table entry"))
    }

    /// Set the entry at a byte offset.
    ///
    /// # Errors
    /// As [`SliceCache::entry`].
    pub fn set_entry(&mut self, offset: u64, value: u64) -> DriverResult<()> {
        let index = self.index_in(offset);
        let at = self.slice_of(offset);
        let slice = self.slices.get_mut(&at).ok_or_else(|| overflow("the offset of a table entry"))?;
        let field = slice.bytes.get_mut(index..index + 8).ok_or_else(|| overflow("the offset of a table entry"))?;
        field.copy_from_slice(&value.to_be_bytes());
        slice.dirty = true;
        Ok(())
    }

    /// Where refcount `index` of the block at byte offset `block` stands: the offset of its slice, and its
    /// index within that.
    #[must_use]
    pub fn locate_refcount(&self, block: u64, order: RefcountOrder, index: u64) -> (u64, usize) {
        let per_slice = order.entries_in(self.size as u64).max(1);
        let at = block + index / per_slice * self.size as u64;
        (at, usize::try_from(index % per_slice).unwrap_or(0))
    }

    /// Refcount `index` of the refcount block at byte offset `block`, in a loaded slice.
    ///
    /// # Errors
    /// As [`SliceCache::entry`].
    pub fn refcount(&self, block: u64, order: RefcountOrder, index: u64) -> DriverResult<u64> {
        let (at, index) = self.locate_refcount(block, order, index);
        self.slices
            .get(&at)
            .and_then(|slice| get_refcount(&slice.bytes, order, index))
            .ok_or_else(|| overflow("the index of a refcount"))
    }

    /// Set refcount `index` of the refcount block at byte offset `block`, in a loaded slice.
    ///
    /// # Errors
    /// As [`SliceCache::entry`], and when the value is too large for the width.
    pub fn set_refcount(&mut self, block: u64, order: RefcountOrder, index: u64, value: u64) -> DriverResult<()> {
        let (at, index) = self.locate_refcount(block, order, index);
        let slice = self.slices.get_mut(&at).ok_or_else(|| overflow("the index of a refcount"))?;
        set_refcount(&mut slice.bytes, order, index, value).ok_or_else(|| overflow("a refcount"))?;
        slice.dirty = true;
        Ok(())
    }

    /// Set bits `first..=last` of the loaded slice at byte offset `offset`, counted from the least significant bit of its
    /// first byte. It is changed only if one of them was clear.
    ///
    /// # Errors
    /// As [`SliceCache::entry`].
    pub fn set_bits(&mut self, offset: u64, first: u64, last: u64) -> DriverResult<()> {
        let at = self.slice_of(offset);
        let slice = self.slices.get_mut(&at).ok_or_else(|| overflow("the offset of a slice"))?;
        for index in first / 8..=last / 8 {
            let low = if index == first / 8 { 0xff << (first % 8) } else { 0xff };
            let high = if index == last / 8 { 0xff >> (7 - last % 8) } else { 0xff };
            let mask: u8 = low & high;
            let byte = usize::try_from(index).ok().and_then(|index| slice.bytes.get_mut(index));
            let byte = byte.ok_or_else(|| overflow("a bit of a bitmap"))?;
            slice.dirty |= *byte & mask != mask;
            *byte |= mask;
        }
        Ok(())
    }

    /// Replace the bytes of a loaded slice; it is changed only if they differ.
    ///
    /// # Errors
    /// As [`SliceCache::entry`].
    pub fn replace(&mut self, offset: u64, bytes: &[u8]) -> DriverResult<()> {
        let at = self.slice_of(offset);
        let slice = self.slices.get_mut(&at).ok_or_else(|| overflow("the offset of a slice"))?;
        if slice.bytes.len() != bytes.len() {
            return Err(overflow("the size of a slice"));
        }
        if *slice.bytes != *bytes {
            slice.bytes.copy_from_slice(bytes);
            slice.dirty = true;
        }
        Ok(())
    }

    /// The bytes of a loaded slice.
    ///
    /// # Errors
    /// As [`SliceCache::entry`].
    pub fn bytes(&self, offset: u64) -> DriverResult<&[u8]> {
        let slice = self.slices.get(&self.slice_of(offset));
        slice.map(|slice| &*slice.bytes).ok_or_else(|| overflow("the offset of a slice"))
    }

    /// Whether a slice that begins in this range of byte offsets is held.
    #[must_use]
    pub fn holds(&self, offsets: Range<u64>) -> bool {
        self.slices.range(offsets).next().is_some()
    }

    /// How many slices are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.slices.len()
    }

    /// Whether anything is to be written.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.slices.values().any(|slice| slice.dirty)
    }

    /// Write all changed slices, in the order of their offsets, with one batch of requests. No flush.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_dirty(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let mut requests: Vec<Request> = self
            .slices
            .iter()
            .filter(|(_, slice)| slice.dirty)
            .map(|(at, slice)| Request::write(self.device, *at, slice.bytes.as_ptr() as u64, slice.bytes.len() as u64))
            .collect();
        if !requests.is_empty() {
            io.run(&mut requests)?;
        }
        for slice in self.slices.values_mut() {
            slice.dirty = false;
        }
        Ok(())
    }

    /// Forget slices until at most `keep` are held. Changed slices stay.
    pub fn shrink(&mut self, keep: usize) {
        let mut excess = self.slices.len().saturating_sub(keep);
        self.slices.retain(|_, slice| {
            if excess > 0 && !slice.dirty {
                excess -= 1;
                return false;
            }
            true
        });
    }

    /// Forget everything, changed or not.
    pub fn clear(&mut self) {
        self.slices.clear();
    }
}
