//! What a target that reads as zeroes is to get of a disk: everything but zeroes.

use core::ops::Range;
use instar_guest_sdk::abi::{ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_guest_view::Layers;

/// Extents that are asked of the layers at once.
const LOOK_AHEAD: usize = 1024;
/// The host is asked about holes in plain data of so many bytes at least: a question takes as long as to copy a little less.
const LEAST: u64 = 1 << 20;

/// The layers, without what they, or their file systems, say is zero.
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
            let left = match extent.content {
                Content::Zero => None,
                Content::Data { device, offset } if extent.length >= LEAST => {
                    push_data(io, extent, (device, offset), out)?
                }
                _ => (!out.push(*extent)).then_some(extent.guest_offset),
            };
            if let Some(left) = left {
                return Ok(left);
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

/// Push what of plain data is no hole. Returns the guest byte from which on there was no room, if there was not.
fn push_data(
    io: &mut dyn BlockIo,
    extent: &Extent,
    (device, offset): (u32, u64),
    out: &mut Extents,
) -> DriverResult<Option<u64>> {
    let mut at = extent.guest_offset;
    while at < extent.end() {
        let from = offset.saturating_add(at - extent.guest_offset);
        let data = io.next_data(device, from..from.saturating_add(extent.end() - at))?;
        if data.is_empty() {
            break;
        }
        let start = at.saturating_add(data.start.saturating_sub(from));
        let end = start.saturating_add(data.end.saturating_sub(data.start));
        let Some(piece) = extent.clip(start..end) else { break };
        if !out.push(piece) {
            return Ok(Some(piece.guest_offset));
        }
        at = piece.end();
    }
    Ok(None)
}
