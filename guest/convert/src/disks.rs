//! Several disks, one behind the other, as one: `qemu-img convert A B C` reads them so.

use crate::salvaged::Salvaged;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{Bitmap, BlockIo, DirtyRanges, DriverError, DriverResult, Extent, Extents, Source};
use instar_guest_view::Layers;

/// Every disk but a single one begins and ends at a multiple of this many bytes.
const SECTOR: u64 = 512;
/// Extents that are asked of a disk at once.
const LOOK_AHEAD: usize = 1024;

/// The disks, as one.
pub struct Disks<'a> {
    /// Each with the byte at which it begins.
    disks: Vec<(u64, Layers<'a>)>,
    size: u64,
    /// The disk that was asked last: the `Encoded` extents that are in use are its own.
    current: usize,
    held: Extents,
    /// What does not decode, if zeroes are to stand for it.
    salvaged: Option<Rc<RefCell<Salvaged>>>,
}

impl<'a> Disks<'a> {
    /// These disks, each of them what its layers show, in this order.
    ///
    /// # Errors
    /// [`ErrorCode::InternalOverflow`] for disks that no number can count together, and for none.
    pub fn new(views: Vec<Layers<'a>>) -> DriverResult<Self> {
        let overflow = || DriverError::new(ErrorCode::InternalOverflow, "no disk, or disks of more than 2^63 bytes");
        let mut disks = Vec::with_capacity(views.len());
        let alone = views.len() == 1;
        let mut size = 0u64;
        for view in views {
            let own = view.info().virtual_size;
            let length = if alone { Some(own) } else { own.checked_next_multiple_of(SECTOR) };
            disks.push((size, view));
            size = length.and_then(|length| size.checked_add(length)).ok_or_else(overflow)?;
        }
        if disks.is_empty() || i64::try_from(size).is_err() {
            return Err(overflow());
        }
        Ok(Self { disks, size, current: 0, held: Extents::with_room_for(LOOK_AHEAD), salvaged: None })
    }

    /// Read what can be read: zeroes where what is compressed does not decode, and images whose metadata is damaged in a place that
    /// does not matter for that. Note both in `salvaged`.
    #[must_use]
    pub fn salvaging(self, salvaged: Rc<RefCell<Salvaged>>) -> Self {
        Self { salvaged: Some(salvaged), ..self }
    }

    fn only(&mut self) -> Option<&mut Layers<'a>> {
        match self.disks.as_mut_slice() {
            [(_, layers)] => Some(layers),
            _ => None,
        }
    }
}

impl Source for Disks<'_> {
    fn info(&self) -> ImageInfo {
        let first = self.disks.first().map(|(_, layers)| layers.info()).unwrap_or_default();
        ImageInfo { virtual_size: self.size, ..first }
    }

    /// Returns 0: nobody asks for the number of clusters, and counting them takes a pass over all tables.
    fn verify(&mut self, io: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        let Self { disks, salvaged, .. } = self;
        let mut wrong = |error| match salvaged {
            Some(salvaged) => salvaged.borrow_mut().pass_over(error),
            None => Err(error),
        };
        disks.iter_mut().try_for_each(|(_, layers)| layers.verify_each_or(io, &mut wrong))?;
        Ok(0)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let Self { disks, size, current, held, .. } = self;
        let after = disks.partition_point(|(start, _)| *start <= range.start);
        // Of disks of no bytes, the last one that begins here is asked: it has some, or nothing follows.
        *current = after.saturating_sub(1);
        let end = disks.get(after).map_or(*size, |(next, _)| *next);
        let Some((start, layers)) = disks.get_mut(*current) else { return Ok(range.end) };
        let own = layers.info().virtual_size;
        let limit = range.end.min(end).saturating_sub(*start).min(own);
        let from = range.start - *start;
        if from >= limit {
            // The rest of a sector, or of the range.
            return Ok(range.end.min(end));
        }
        held.clear();
        let next = layers.extents(io, from..limit, held)?;
        for extent in held.iter() {
            let moved = Extent { guest_offset: extent.guest_offset.saturating_add(*start), ..*extent };
            if !out.push(moved) {
                return Ok(moved.guest_offset);
            }
        }
        let next = next.saturating_add(*start);
        Ok(if next >= start.saturating_add(own) { range.end.min(end).max(next) } else { next })
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let gone = || DriverError::new(ErrorCode::InternalOverflow, "an extent of another disk");
        let disk = u32::try_from(self.current).map_err(|_| gone())?;
        let (start, layers) = self.disks.get_mut(self.current).ok_or_else(gone)?;
        let guest_offset = extent.guest_offset.checked_sub(*start).ok_or_else(gone)?;
        let own = from.checked_sub(*start).ok_or_else(gone)?;
        match (layers.read(io, &Extent { guest_offset, ..*extent }, own, buffer), &self.salvaged) {
            (Err(error), Some(salvaged)) if error.code == ErrorCode::ParseFailed => {
                buffer.fill(0);
                salvaged.borrow_mut().add(disk, own, buffer.len() as u64);
                Ok(())
            }
            (read, _) => read,
        }
    }

    /// None: the target is nobody's parent.
    fn identity(&self) -> Option<ImageId> {
        None
    }

    /// Nothing is recorded of the target in what is read.
    fn follow_parent(&mut self, _: &mut dyn BlockIo, _: &ImageId, _: ParentStage) -> DriverResult<()> {
        Ok(())
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Err(DriverError::new(ErrorCode::InternalOverflow, "what is converted is not emptied"))
    }

    /// Those of the image that the operator names: what is below it has a history of its own. Of several disks, none.
    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        self.only().and_then(Layers::top).map_or_else(|| Ok(Vec::new()), |top| top.bitmaps(io))
    }

    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        let size = self.size;
        self.only().and_then(Layers::top).map_or(Ok(size), |top| top.dirty(io, index, from, out))
    }
}
