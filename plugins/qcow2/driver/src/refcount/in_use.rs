//! Which clusters have a refcount, of ranges that an image may claim billions of clusters in.

use crate::image::{overflow, Image};
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{BlockIo, DriverResult, Holes};
use instar_qcow2_format::{get_refcount, HostCluster, RefcountOrder};

/// Refcount blocks that are looked at in one go while counting.
const BLOCKS_AT_ONCE: u64 = 64;
/// Bytes of a slice that is counted, at most.
const SLICE_BYTES: u64 = 4096;
/// Slices that are read at once while counting: 1 MiB.
const SLICES_AT_ONCE: usize = 256;

/// Clusters in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// How many there are.
    pub count: u64,
    /// The last of them.
    pub last: Option<HostCluster>,
}

/// A refcount block, or a slice of one.
struct Described {
    /// Byte offset in the file.
    at: u64,
    /// The first cluster that it describes.
    first: u64,
    /// The refcounts that are asked for, by their index in it.
    wanted: Range<u64>,
}

impl Described {
    /// Add the clusters whose refcount in these bytes is not 0; zeroes are passed over eight bytes at once.
    fn add_in_use(&self, bytes: &[u8], order: RefcountOrder, found: &mut InUse) {
        // Refcounts that eight bytes hold: one at least, 64 at most.
        let per_word = order.entries_in(8);
        for (number, word) in (0u64..).zip(bytes.chunks_exact(8)).filter(|(_, word)| *word != [0; 8]) {
            let first = number * per_word;
            for (position, index) in (0usize..).zip(first..first + per_word) {
                let in_use = get_refcount(word, order, position).is_some_and(|count| count != 0);
                if in_use && self.wanted.contains(&index) {
                    *found = InUse { count: found.count + 1, last: Some(HostCluster(self.first + index)) };
                }
            }
        }
    }
}

impl Refcounts {
    /// Which of these clusters have a refcount that is not 0. Refcount blocks in holes are not read, and zeroes are passed
    /// over eight bytes at once: an image may claim billions of clusters. Slices that are held count as they are.
    ///
    /// # Errors
    /// Corruption of the refcount table, and I/O errors.
    pub fn in_use(&mut self, io: &mut dyn BlockIo, image: &Image, clusters: Range<u64>) -> DriverResult<InUse> {
        let per_block = self.per_block();
        let end = clusters.end.min(self.table_entries.saturating_mul(per_block));
        if clusters.start >= end {
            return Ok(InUse::default());
        }
        let (mut holes, mut found) = (Holes::default(), InUse::default());
        let mut index = clusters.start / per_block;
        while index <= (end - 1) / per_block {
            let until = (index + BLOCKS_AT_ONCE).min((end - 1) / per_block + 1);
            self.table.shrink(CLUSTERS_PER_LOAD);
            self.blocks.shrink(CLUSTERS_PER_LOAD / 16);
            let entries: Vec<u64> = (index..until).map(|index| self.table_entry_at(index)).collect();
            self.table.load(io, entries)?;
            let mut blocks = Vec::new();
            for index in index..until {
                if let Some(block) = self.block(image, index, |offset| image.holds_cluster(offset))? {
                    let first = index * per_block;
                    let wanted = clusters.start.max(first) - first..(end - first).min(per_block);
                    blocks.push(Described { at: block.0, first, wanted });
                }
            }
            self.in_use_in_blocks(io, &mut holes, &blocks, &mut found)?;
            index = until;
        }
        Ok(found)
    }

    /// Add what is in use of what these blocks describe.
    fn in_use_in_blocks(
        &self,
        io: &mut dyn BlockIo,
        holes: &mut Holes,
        blocks: &[Described],
        found: &mut InUse,
    ) -> DriverResult<()> {
        let device = self.blocks.device();
        let bytes = self.cluster_size().bytes();
        let slice = bytes.min(SLICE_BYTES);
        let per_slice = self.order().entries_in(slice);
        let whole: Vec<_> = blocks.iter().map(|block| block.at..block.at + bytes).collect();
        // One block is read as quickly as it is asked for.
        let data = if blocks.len() > 1 { holes.hold_data(io, device, &whole)? } else { vec![true; blocks.len()] };
        let held = |at: u64, bytes: u64| self.blocks.holds(at..at + bytes);
        let mut slices = Vec::new();
        for (block, _) in blocks.iter().zip(data).filter(|(block, data)| *data || held(block.at, bytes)) {
            for number in block.wanted.start / per_slice..block.wanted.end.div_ceil(per_slice) {
                let skipped = number * per_slice;
                let wanted = block.wanted.start.max(skipped) - skipped..(block.wanted.end - skipped).min(per_slice);
                slices.push(Described { at: block.at + number * slice, first: block.first + skipped, wanted });
            }
        }
        let ranges: Vec<_> = slices.iter().map(|part| part.at..part.at + slice).collect();
        let data = if slices.len() > 1 { holes.hold_data(io, device, &ranges)? } else { vec![true; slices.len()] };
        let wanted = slices.into_iter().zip(data).filter(|(part, data)| *data || held(part.at, slice));
        let wanted: Vec<_> = wanted.map(|(part, _)| part).collect();
        let size = usize::try_from(slice).map_err(|_| overflow("the size of a slice"))?;
        let mut buffer = vec![0u8; size * wanted.len().min(SLICES_AT_ONCE)];
        for batch in wanted.chunks(SLICES_AT_ONCE) {
            let places = buffer.chunks_exact_mut(size).zip(batch);
            let mut requests: Vec<Request> =
                places.map(|(bytes, part)| Request::read(device, part.at, bytes.as_mut_ptr() as u64, slice)).collect();
            io.run(&mut requests)?;
            for (read, part) in buffer.chunks_exact(size).zip(batch) {
                part.add_in_use(self.blocks.bytes(part.at).unwrap_or(read), self.order(), found);
            }
        }
        Ok(())
    }
}
