//! Walking what an image maps, in the order of the guest: each cluster that its L2 tables hold anything of.

use crate::image::{overflow, Image};
use crate::metadata::l2_entry::{decode_entry, verify_place, Mapped};
use crate::metadata::l2_slices::L2Slices;
use alloc::format;
use core::ops::Range;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::L2Entry;

/// Walks the clusters that one image maps; the slices of L2 tables that were read last are held.
pub(crate) struct MappedClusters {
    window: L2Slices,
}

impl MappedClusters {
    /// A walk of this image; nothing is read yet.
    pub(crate) fn new(image: &Image) -> Self {
        Self { window: L2Slices::new(image) }
    }

    /// Call `each` for every cluster that the image maps anything of, from guest byte `from` on (a multiple of the
    /// cluster size), ascending, until it returns `false`.
    pub(crate) fn walk(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        from: u64,
        each: &mut dyn FnMut(Mapped) -> DriverResult<bool>,
    ) -> DriverResult<()> {
        self.walk_range(io, image, from..image.header.virtual_size, each)
    }

    /// [`MappedClusters::walk`] of the clusters that begin within a range. Tables are read for the range only.
    pub(crate) fn walk_range(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        range: Range<u64>,
        each: &mut dyn FnMut(Mapped) -> DriverResult<bool>,
    ) -> DriverResult<()> {
        let end = range.end.min(image.header.virtual_size);
        let cluster = image.cluster_size().bytes();
        let width = image.header.l2_entry_bytes();
        let step = usize::try_from(width).map_err(|_| overflow("the size of an L2 entry"))?;
        let mut guest = range.start;
        while let Some(slice) = self.window.next(io, image, guest..end)? {
            guest = guest.max(slice.guest);
            let skip = usize::try_from((guest - slice.guest) / cluster).map_err(|_| overflow("an L2 index"))?;
            for (index, raw) in (0u64..).zip(slice.bytes.chunks_exact(step)).skip(skip) {
                let guest = slice.guest + index * cluster;
                if guest >= end {
                    return Ok(());
                }
                if raw.iter().all(|&byte| byte == 0) {
                    continue;
                }
                let at = slice.host + index * width;
                let (entry, subclusters) = decode_entry(image, raw)
                    .map_err(|error| image.corrupt(at, format!("the L2 entry of guest offset {guest} {error}")))?;
                let mapped = Mapped { guest, at, entry, subclusters };
                verify_place(image, &mapped)?;
                if entry != L2Entry::Unallocated && !each(mapped)? {
                    return Ok(());
                }
            }
            guest = slice.end;
        }
        Ok(())
    }
}
