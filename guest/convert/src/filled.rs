//! What a target that may hold anything is to get of a disk: all of it, zeroes as well.

use core::ops::Range;
use instar_guest_sdk::abi::ImageInfo;
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_guest_view::Filter;

/// Extents that are asked of the disk at once.
const LOOK_AHEAD: usize = 1024;
/// The location of zeroes that are written as data: no disk has this many encoded extents.
const ZEROES: u64 = u64::MAX;

/// Makes a disk one without a gap.
pub struct Filled {
    /// Zeroes are data, so that the target allocates them.
    allocate: bool,
    size: u64,
    held: Extents,
}

impl Filled {
    /// With zeroes up to `size` bytes where the disk holds nothing; with `allocate`, they are data.
    pub fn new(size: u64, allocate: bool) -> Self {
        Self { allocate, size, held: Extents::with_room_for(LOOK_AHEAD) }
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

impl Filter for Filled {
    fn info(&self, source: &dyn Source) -> ImageInfo {
        ImageInfo { virtual_size: self.size, ..source.info() }
    }

    fn extents(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        out: &mut Extents,
    ) -> DriverResult<u64> {
        let Self { allocate, size, held } = self;
        let end = range.end.min(*size);
        held.clear();
        let own = source.info().virtual_size.min(end);
        let next = if range.start < own { source.extents(io, range.start..own, held)? } else { end };
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

    fn read(
        &mut self,
        source: &mut dyn Source,
        io: &mut dyn BlockIo,
        (extent, from): (&Extent, u64),
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        if extent.content == (Content::Encoded { location: ZEROES }) {
            buffer.fill(0);
            return Ok(());
        }
        source.read(io, extent, from, buffer)
    }
}
