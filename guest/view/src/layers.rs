//! Several layers seen as one disk: an overlay, and those below it.
//!
//! What the top-most layer holds wins. Past the end of a layer that is shorter than the overlay, everything below it is
//! hidden by zeroes, as a guest of the overlay sees it; and what lies past the end of the overlay is not committed.

use crate::below::read_extent;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, Extent, ExtentKind, ImageId, ImageInfo, MemberRole, ParentStage};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};

/// Extents that are asked of a layer at once, at most …
const LOOK_AHEAD: usize = 1024;
/// … and at least, however many layers share the heap.
const LEAST_LOOK_AHEAD: usize = 32;
/// Extents that all layers together have ahead.
const ALL_AHEAD: usize = 16 << 10;

/// A layer, and what it holds next.
struct Layer<'a> {
    source: Box<dyn Source + 'a>,
    /// Virtual size in bytes.
    size: u64,
    /// Extents that were enumerated and not passed yet, ascending, from this one on.
    ahead: Vec<Extent>,
    first: usize,
    /// The guest byte at which enumerating goes on.
    next: u64,
}

/// What is seen at a place through all layers.
#[derive(Clone, Copy, Debug)]
pub enum Seen {
    /// What is below them.
    Nothing,
    /// Zeroes: the layer with this index has ended, and those above it hold nothing.
    Zeroes(usize),
    /// An extent of the layer with this index; the place is somewhere in it.
    Held(usize, Extent),
}

/// Where what is seen comes from, as messages to the host have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The layer that it is seen in: 0 is the top-most.
    pub depth: u32,
    /// An [`ExtentKind`] as a number; 0 where no layer holds it.
    pub kind: u32,
    /// Of plain data, the device; else 0.
    pub device: u32,
    /// Of plain data, the byte offset on it; else 0.
    pub offset: u64,
}

/// The layers, as one.
pub struct Layers<'a> {
    layers: Vec<Layer<'a>>,
    /// Extents that are asked of a layer at once.
    look_ahead: usize,
    /// The guest byte up to which extents were handed out.
    position: u64,
    /// The extents behind the `Encoded` ones that were handed out last, each with the index of its layer.
    encoded: Vec<(usize, Extent)>,
}

fn end_of(extent: &Extent) -> u64 {
    extent.guest_offset.saturating_add(extent.length)
}

impl<'a> Layer<'a> {
    fn new(source: Box<dyn Source + 'a>) -> Self {
        let size = source.info().virtual_size;
        Self { source, size, ahead: Vec::new(), first: 0, next: 0 }
    }

    /// Begin again so that what is held from guest byte `from` on will be found.
    fn restart(&mut self, from: u64) {
        self.ahead.clear();
        self.first = 0;
        self.next = from - from % self.source.info().cluster_size.max(1);
    }

    /// The first extent that ends past guest byte `from`, if it begins before `end`; `from` does not go back. At most
    /// `look_ahead` extents are asked of the layer at once.
    fn peek(&mut self, io: &mut dyn BlockIo, from: u64, end: u64, look_ahead: usize) -> DriverResult<Option<Extent>> {
        loop {
            while let Some(extent) = self.ahead.get(self.first) {
                if end_of(extent) > from {
                    return Ok(Some(*extent));
                }
                self.first += 1;
            }
            let end = end.min(self.size);
            if self.next >= end {
                return Ok(None);
            }
            if self.next < from {
                // What the layers above hide is not enumerated.
                self.restart(from);
            }
            self.ahead.clear();
            self.first = 0;
            let next = self.source.extents(io, self.next..end, look_ahead, &mut self.ahead)?;
            if next <= self.next {
                return Err(DriverError::new(ErrorCode::InternalOverflow, "the source does not advance"));
            }
            self.next = next;
        }
    }
}

impl<'a> Layers<'a> {
    /// These layers, the overlay first.
    #[must_use]
    pub fn new(layers: Vec<Box<dyn Source + 'a>>) -> Self {
        let look_ahead = (ALL_AHEAD / layers.len().max(1)).clamp(LEAST_LOOK_AHEAD, LOOK_AHEAD);
        Self { layers: layers.into_iter().map(Layer::new).collect(), look_ahead, position: 0, encoded: Vec::new() }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.layers.len()
    }

    /// What is seen at guest byte `at`, which does not go back from call to call, and up to which byte (`limit` at most)
    /// that goes.
    ///
    /// # Errors
    /// Those of the sources.
    pub fn seen(&mut self, io: &mut dyn BlockIo, at: u64, limit: u64) -> DriverResult<(Seen, u64)> {
        let mut end = limit;
        for (index, layer) in self.layers.iter_mut().enumerate() {
            if at >= layer.size {
                return Ok((Seen::Zeroes(index), end));
            }
            end = end.min(layer.size);
            match layer.peek(io, at, limit, self.look_ahead)? {
                Some(extent) if extent.guest_offset <= at => {
                    return Ok((Seen::Held(index, extent), end.min(end_of(&extent))));
                }
                Some(extent) => end = end.min(extent.guest_offset),
                None => {}
            }
        }
        Ok((Seen::Nothing, end))
    }

    /// The images of a group that are read, the top-most first.
    ///
    /// # Errors
    /// What opening them gives.
    pub fn of_group(operation: &Operation<'a>, group: u32) -> DriverResult<Self> {
        let mut layers: Vec<Box<dyn Source + 'a>> = Vec::new();
        for device in operation.devices_of_group(group, &[MemberRole::Read]) {
            layers.push(Box::new(operation.format_of(device)?.open_source(device)?));
        }
        Ok(Self::new(layers))
    }

    /// Where what is seen at guest byte `at` comes from.
    #[must_use]
    pub fn place(&self, seen: Seen, at: u64) -> Place {
        let place = |index: usize, kind| {
            let depth = u32::try_from(index).unwrap_or(u32::MAX);
            Place { depth, kind, device: 0, offset: 0 }
        };
        match seen {
            Seen::Nothing => place(self.layers.len().saturating_sub(1), 0),
            // The layer with this index has ended: it is the one above that reads as zeroes.
            Seen::Zeroes(index) => place(index.saturating_sub(1), 0),
            Seen::Held(index, extent) if extent.kind == ExtentKind::Data as u32 => Place {
                device: extent.device,
                offset: extent.location.saturating_add(at - extent.guest_offset),
                ..place(index, extent.kind)
            },
            Seen::Held(index, extent) => place(index, extent.kind),
        }
    }

    /// Read what is seen somewhere: the bytes of the disk from `at` on.
    ///
    /// # Errors
    /// Those of the source that holds it.
    pub fn read_seen(&mut self, io: &mut dyn BlockIo, seen: Seen, at: u64, buffer: &mut [u8]) -> DriverResult<()> {
        match seen {
            Seen::Nothing | Seen::Zeroes(_) => {
                buffer.fill(0);
                Ok(())
            }
            Seen::Held(index, extent) => match self.layers.get_mut(index) {
                Some(layer) => read_extent(io, layer.source.as_mut(), &extent, at, buffer),
                None => Err(DriverError::new(ErrorCode::InternalOverflow, "a layer that does not exist")),
            },
        }
    }

    /// The part `at..end` of what is seen there, as an extent.
    fn part(&mut self, seen: Seen, at: u64, end: u64) -> Option<Extent> {
        let zero = Extent { kind: ExtentKind::Zero as u32, ..Extent::default() };
        let (index, whole) = match seen {
            Seen::Nothing => return None,
            Seen::Zeroes(_) => (0, zero),
            Seen::Held(index, whole) => (index, whole),
        };
        let mut extent = Extent { guest_offset: at, length: end - at, ..whole };
        match ExtentKind::from_u32(whole.kind) {
            Some(ExtentKind::Data | ExtentKind::Memory) => extent.location += at - whole.guest_offset,
            Some(ExtentKind::Encoded) => {
                extent.location = self.encoded.len() as u64;
                self.encoded.push((index, whole));
            }
            Some(ExtentKind::Zero) | None => (extent.location, extent.device) = (0, 0),
        }
        Some(extent)
    }
}

/// Append an extent, or lengthen the one that it goes on from.
fn push(out: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = out.last_mut().filter(|last| end_of(last) == extent.guest_offset && last.kind == extent.kind) {
        let data = extent.kind == ExtentKind::Data as u32
            && last.device == extent.device
            && last.location + last.length == extent.location;
        if data || extent.kind == ExtentKind::Zero as u32 {
            last.length += extent.length;
            return;
        }
    }
    out.push(extent);
}

impl Source for Layers<'_> {
    fn info(&self) -> ImageInfo {
        self.layers.first().map(|layer| layer.source.info()).unwrap_or_default()
    }

    /// Returns how many clusters of the overlay's cluster size the layers hold together.
    fn check(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "several layers cannot be emptied"));
        }
        for layer in &mut self.layers {
            layer.source.check(io, false)?;
        }
        let ImageInfo { virtual_size, cluster_size } = self.info();
        let unit = cluster_size.max(1);
        let (mut clusters, mut counted) = (0, 0);
        let (mut from, mut extents) = (0, Vec::new());
        while from < virtual_size {
            extents.clear();
            from = self.extents(io, from..virtual_size, LOOK_AHEAD, &mut extents)?;
            for extent in &extents {
                let first = (extent.guest_offset / unit).max(counted);
                counted = end_of(extent).div_ceil(unit);
                clusters += counted.saturating_sub(first);
            }
        }
        Ok(clusters)
    }

    fn extents(
        &mut self,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        max: usize,
        out: &mut Vec<Extent>,
    ) -> DriverResult<u64> {
        let from = range.start;
        if from < self.position {
            self.layers.iter_mut().for_each(|layer| layer.restart(from));
        }
        self.encoded.clear();
        let limit = range.end.min(self.info().virtual_size);
        let held_before = out.len();
        let mut at = from;
        while at < limit {
            let (seen, end) = self.seen(io, at, limit)?;
            if end <= at {
                return Err(DriverError::new(ErrorCode::InternalOverflow, "the layers do not advance"));
            }
            // One that goes on from the last would take no room; that is not known before.
            if !matches!(seen, Seen::Nothing) && out.len() - held_before >= max {
                break;
            }
            if let Some(extent) = self.part(seen, at, end) {
                push(out, extent);
            }
            at = end;
        }
        self.position = at;
        Ok(at)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let held = usize::try_from(extent.location).ok().and_then(|index| self.encoded.get(index).copied());
        let layer = held.and_then(|(index, whole)| Some((self.layers.get_mut(index)?, whole)));
        let (layer, whole) =
            layer.ok_or_else(|| DriverError::new(ErrorCode::InternalOverflow, "an extent of before"))?;
        layer.source.read(io, &whole, from, buffer)
    }

    /// The lowest layer is the one whose parent is written.
    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.layers.last_mut().map_or(Ok(()), |lowest| lowest.source.follow_parent(io, identity, stage))
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Err(DriverError::new(ErrorCode::InternalOverflow, "several layers cannot be emptied"))
    }
}
