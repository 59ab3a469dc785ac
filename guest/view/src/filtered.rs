//! A source of which an operation is shown something else than it says by itself.

use alloc::vec::Vec;
use core::ops::{DerefMut, Range};
use instar_guest_sdk::abi::{ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{Bitmap, BlockIo, DirtyRanges, DriverResult, Extent, Extents, Source};

/// What a filter changes about a source. Everything else is the source's.
pub trait Filter {
    /// The facts of the source, as they are shown.
    fn info(&self, source: &dyn Source) -> ImageInfo {
        source.info()
    }

    /// The extents of the source, as they are shown: as [`Source::extents`].
    ///
    /// # Errors
    /// What the source says.
    fn extents(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        out: &mut Extents,
    ) -> DriverResult<u64>;

    /// Read a part of an extent that was shown: as [`Source::read`].
    ///
    /// # Errors
    /// What the source says.
    fn read(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        (extent, from): (&Extent, u64),
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        source.read(io, extent, from, buffer)
    }
}

/// A source behind a filter.
pub struct Filtered<S, F> {
    source: S,
    filter: F,
}

impl<S, F> Filtered<S, F> {
    /// This source behind this filter.
    pub const fn by(filter: F, source: S) -> Self {
        Self { source, filter }
    }
}

impl<'a, S: DerefMut<Target = dyn Source + 'a>, F: Filter> Source for Filtered<S, F> {
    fn info(&self) -> ImageInfo {
        self.filter.info(&*self.source)
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.source.verify(io, will_empty)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        self.filter.extents(&mut *self.source, io, range, out)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        self.filter.read(&mut *self.source, io, (extent, from), buffer)
    }

    fn identity(&self) -> Option<ImageId> {
        self.source.identity()
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.source.follow_parent(io, identity, stage)
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.source.empty(io)
    }

    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        self.source.bitmaps(io)
    }

    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        self.source.dirty(io, index, from, out)
    }
}
