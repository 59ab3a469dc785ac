//! Reading what lies below the backing: its ancestors, nearest first.

use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{Extent, ExtentKind};
use instar_guest_sdk::{BlockIo, DriverResult, ReadBelow, Source};

/// Extents asked for at once.
const EXTENTS: usize = 64;

/// The ancestors of the backing, nearest first.
pub struct Ancestors<'a> {
    layers: Vec<Box<dyn Source + 'a>>,
}

impl<'a> Ancestors<'a> {
    /// These layers, nearest first; none for a backing without a backing.
    #[must_use]
    pub fn new(layers: Vec<Box<dyn Source + 'a>>) -> Self {
        Self { layers }
    }
}

/// Fill `buffer`, which begins at guest byte `start`, from `layers`: what the first layer holds, and the rest
/// from those below it. What no layer holds is zero.
fn fill(io: &mut dyn BlockIo, layers: &mut [Box<dyn Source + '_>], start: u64, buffer: &mut [u8]) -> DriverResult<()> {
    let Some((layer, below)) = layers.split_first_mut() else {
        buffer.fill(0);
        return Ok(());
    };
    let info = layer.info();
    let end = start.saturating_add(buffer.len() as u64);
    // Past the end of a shorter layer everything reads as zeroes, whatever is below it.
    let visible = end.min(info.virtual_size).max(start);
    let mut done = start;
    let mut from = start - start % info.cluster_size.max(1);
    let mut extents = Vec::new();
    while done < visible && from < visible {
        extents.clear();
        from = layer.extents(io, from..visible, EXTENTS, &mut extents)?;
        for extent in &extents {
            let first = extent.guest_offset.max(done);
            let last = extent.guest_offset.saturating_add(extent.length).min(visible);
            if first >= last {
                continue;
            }
            fill(io, below, done, part(buffer, start, done, first))?;
            read_extent(io, layer.as_mut(), extent, first, part(buffer, start, first, last))?;
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

/// Read the bytes of an extent from guest byte `at` on.
fn read_extent(
    io: &mut dyn BlockIo,
    layer: &mut dyn Source,
    extent: &Extent,
    at: u64,
    buffer: &mut [u8],
) -> DriverResult<()> {
    if buffer.is_empty() {
        return Ok(());
    }
    match ExtentKind::from_u32(extent.kind) {
        Some(ExtentKind::Data) => {
            io.read(extent.device, extent.location.saturating_add(at - extent.guest_offset), buffer)
        }
        Some(ExtentKind::Zero) => {
            buffer.fill(0);
            Ok(())
        }
        _ => layer.read(io, extent, at, buffer),
    }
}

impl ReadBelow for Ancestors<'_> {
    fn exists(&self) -> bool {
        !self.layers.is_empty()
    }

    fn length(&self) -> u64 {
        // Past the end of the nearest layer nothing below it is seen.
        self.layers.first().map_or(0, |layer| layer.info().virtual_size)
    }

    fn read(&mut self, io: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        fill(io, &mut self.layers, guest_offset, buffer)
    }
}
