//! What a target that may hold anything is to get of a disk: all of it, zeroes as well.

use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{Bitmap, BlockIo, Content, DirtyRanges, DriverResult, Extent, Extents, Source};

/// Extents that are asked of the disk at once.
const LOOK_AHEAD: usize = 1024;
/// The location of zeroes that are written as data: no disk has this many encoded extents.
const ZEROES: u64 = u64::MAX;

/// A disk without a gap.
pub struct Filled<'a> {
    disk: &'a mut dyn Source,
    /// Zeroes are data, so that the target allocates them.
    allocate: bool,
    size: u64,
    held: Extents,
}

impl<'a> Filled<'a> {
    /// This disk, with zeroes up to `size` bytes where it holds nothing; with `allocate`, they are data.
    pub fn new(disk: &'a mut dyn Source, size: u64, allocate: bool) -> Self {
        Self { disk, allocate, size, held: Extents::with_room_for(LOOK_AHEAD) }
    }
}

/// Zeroes, as a target is to get them.
fn zeroes(allocate: bool, at: u64, length: u64) -> Extent {
    if allocate {
        Extent::encoded(at, length, ZEROES)
    } else {
        Extent::zero(at, length)
    }
}

impl Source for Filled<'_> {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.size, ..self.disk.info() }
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.disk.verify(io, will_empty)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let Self { disk, allocate, size, held } = self;
        let end = range.end.min(*size);
        held.clear();
        let own = disk.info().virtual_size.min(end);
        let next = if range.start < own { disk.extents(io, range.start..own, held)? } else { end };
        // Behind the disk's own end, there is nothing but zeroes.
        let next = if next >= own { end.max(next) } else { next };
        let mut at = range.start;
        for extent in held.iter() {
            if extent.guest_offset > at && !out.push(zeroes(*allocate, at, extent.guest_offset - at)) {
                return Ok(at);
            }
            at = at.max(extent.guest_offset);
            let piece = match extent.content {
                Content::Zero => zeroes(*allocate, extent.guest_offset, extent.length),
                _ => *extent,
            };
            if !out.push(piece) {
                return Ok(at);
            }
            at = extent.end();
        }
        if at < next && !out.push(zeroes(*allocate, at, next - at)) {
            return Ok(at);
        }
        Ok(next)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        if extent.content == (Content::Encoded { location: ZEROES }) {
            buffer.fill(0);
            return Ok(());
        }
        self.disk.read(io, extent, from, buffer)
    }

    fn identity(&self) -> Option<ImageId> {
        self.disk.identity()
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.disk.follow_parent(io, identity, stage)
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.disk.empty(io)
    }

    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        self.disk.bitmaps(io)
    }

    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        self.disk.dirty(io, index, from, out)
    }
}
