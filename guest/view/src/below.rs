//! Reading what lies below the backing: its ancestors, nearest first.

use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, Content, DriverError, DriverResult, Extent, Extents, ReadBelow, Source};

/// Extents asked for at once.
const EXTENTS: usize = 64;

/// Opens a layer when it is needed.
pub type Opener<'a> = Box<dyn FnMut() -> DriverResult<Box<dyn Source + 'a>> + 'a>;

/// A layer below the backing. In a long chain most are never looked at, and none of those takes memory.
enum Layer<'a> {
    Open(Box<dyn Source + 'a>),
    /// Virtual size in bytes, and how to open it.
    Closed(u64, Opener<'a>),
}

impl<'a> Layer<'a> {
    /// Virtual size in bytes.
    fn size(&self) -> u64 {
        match self {
            Self::Open(source) => source.info().virtual_size,
            Self::Closed(size, _) => *size,
        }
    }

    /// The source, opened by now.
    fn source(&mut self) -> DriverResult<&mut (dyn Source + 'a)> {
        if let Self::Closed(_, open) = self {
            *self = Self::Open(open()?);
        }
        match self {
            Self::Open(source) => Ok(source.as_mut()),
            Self::Closed(..) => Err(DriverError::new(ErrorCode::InternalOverflow, "a layer that did not open")),
        }
    }
}

/// The ancestors of the backing, nearest first.
pub struct Ancestors<'a> {
    layers: Vec<Layer<'a>>,
}

impl<'a> Ancestors<'a> {
    /// These layers, nearest first; none for a backing without a backing.
    #[must_use]
    pub fn new(layers: Vec<Box<dyn Source + 'a>>) -> Self {
        Self { layers: layers.into_iter().map(Layer::Open).collect() }
    }

    /// The same, each of this virtual size and opened only when something is read from it.
    #[must_use]
    pub fn when_needed(layers: impl IntoIterator<Item = (u64, Opener<'a>)>) -> Self {
        Self { layers: layers.into_iter().map(|(size, open)| Layer::Closed(size, open)).collect() }
    }
}

/// Fill `buffer`, which begins at guest byte `start`, from `layers`: what the first layer holds, and the rest
/// from those below it. What no layer holds is zero.
fn fill(io: &mut dyn BlockIo, layers: &mut [Layer<'_>], start: u64, buffer: &mut [u8]) -> DriverResult<()> {
    if buffer.is_empty() {
        return Ok(());
    }
    let Some((layer, below)) = layers.split_first_mut() else {
        buffer.fill(0);
        return Ok(());
    };
    let layer = layer.source()?;
    let info = layer.info();
    let end = start.saturating_add(buffer.len() as u64);
    // Past the end of a shorter layer everything reads as zeroes, whatever is below it.
    let visible = end.min(info.virtual_size).max(start);
    let mut done = start;
    let mut from = start - start % info.cluster_size.max(1);
    let mut extents = Extents::with_room_for(EXTENTS);
    while done < visible && from < visible {
        extents.clear();
        from = layer.extents(io, from..visible, &mut extents)?;
        for extent in extents.iter() {
            let Some(seen) = extent.clip(done..visible) else { continue };
            let (first, last) = (seen.guest_offset, seen.end());
            fill(io, below, done, part(buffer, start, done, first))?;
            read_extent(io, layer, extent, first, part(buffer, start, first, last))?;
            done = last;
        }
    }
    fill(io, below, done, part(buffer, start, done, visible))?;
    part(buffer, start, visible, end).fill(0);
    Ok(())
}

/// The part `first..last` (guest bytes) of a buffer that begins at guest byte `start`.
fn part(buffer: &mut [u8], start: u64, first: u64, last: u64) -> &mut [u8] {
    let index = |at: u64| usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX);
    buffer.get_mut(index(first)..index(last)).unwrap_or_default()
}

/// Read the bytes of an extent of a layer, from guest byte `at` on.
///
/// # Errors
/// Those of the layer.
pub fn read_extent(
    io: &mut dyn BlockIo,
    layer: &mut dyn Source,
    extent: &Extent,
    at: u64,
    buffer: &mut [u8],
) -> DriverResult<()> {
    if buffer.is_empty() {
        return Ok(());
    }
    match extent.content {
        Content::Data { device, offset } => io.read(device, offset.saturating_add(at - extent.guest_offset), buffer),
        Content::Zero => {
            buffer.fill(0);
            Ok(())
        }
        Content::Encoded { .. } | Content::Memory { .. } => layer.read(io, extent, at, buffer),
    }
}

impl ReadBelow for Ancestors<'_> {
    fn exists(&self) -> bool {
        !self.layers.is_empty()
    }

    fn length(&self) -> u64 {
        // Past the end of the nearest layer nothing below it is seen.
        self.layers.first().map_or(0, Layer::size)
    }

    fn read(&mut self, io: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        fill(io, &mut self.layers, guest_offset, buffer)
    }
}
