//! What a target that reads as zeroes is to get of a disk: everything but zeroes.

use core::ops::Range;
use instar_guest_sdk::abi::{ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_guest_view::Layers;

/// Extents that are asked of the layers at once.
const LOOK_AHEAD: usize = 1024;

/// The layers, without what they say is zero.
pub struct NonZero<'a> {
    layers: Layers<'a>,
    held: Extents,
}

impl<'a> NonZero<'a> {
    /// What these layers show.
    pub fn new(layers: Layers<'a>) -> Self {
        Self { layers, held: Extents::with_room_for(LOOK_AHEAD) }
    }
}

impl Source for NonZero<'_> {
    fn info(&self) -> ImageInfo {
        self.layers.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.layers.verify(io, will_empty)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let Self { layers, held } = self;
        held.clear();
        let next = layers.extents(io, range, held)?;
        for extent in held.iter() {
            if !matches!(extent.content, Content::Zero) && !out.push(*extent) {
                return Ok(extent.guest_offset);
            }
        }
        Ok(next)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        self.layers.read(io, extent, from, buffer)
    }

    /// None: the target is nobody's parent.
    fn identity(&self) -> Option<ImageId> {
        None
    }

    /// Nothing is recorded of the target in what is read.
    fn follow_parent(&mut self, _: &mut dyn BlockIo, _: &ImageId, _: ParentStage) -> DriverResult<()> {
        Ok(())
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.layers.empty(io)
    }
}
