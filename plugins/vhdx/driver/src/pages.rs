//! Changes of metadata, which the log takes in whole pages.

use crate::image::Image;
use alloc::collections::btree_map::{BTreeMap, Entry};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Pages as they will be.
#[derive(Debug, Default)]
pub struct Pages {
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Pages {
    /// Replace the bytes of the file at byte `offset`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn put(&mut self, io: &mut dyn BlockIo, image: &Image, offset: u64, bytes: &[u8]) -> DriverResult<()> {
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let (start, within) = (at - at % PAGE, usize::try_from(at % PAGE).unwrap_or(0));
            let page = match self.pages.entry(start) {
                Entry::Occupied(page) => page.into_mut(),
                Entry::Vacant(place) => {
                    let mut page = vec![0; usize::try_from(PAGE).unwrap_or(0)];
                    image.read(io, start, &mut page)?;
                    place.insert(page)
                }
            };
            let page = page.get_mut(within..).ok_or_else(|| overflow("a page"))?;
            let count = page.len().min(rest.len());
            page[..count].copy_from_slice(&rest[..count]);
            (at, rest) = (at.checked_add(count as u64).ok_or_else(|| overflow("a page"))?, &rest[count..]);
        }
        Ok(())
    }

    /// The pages with their byte offsets, ascending.
    pub fn into_vec(self) -> Vec<(u64, Vec<u8>)> {
        self.pages.into_iter().collect()
    }
}
