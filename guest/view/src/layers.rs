//! Several layers seen as one disk: an overlay, and those below it.
//!
//! What the top-most layer holds wins. Past the end of a layer that is shorter than the overlay, everything below it is
//! hidden by zeroes, as a guest of the overlay sees it; and what lies past the end of the overlay is not committed.

use crate::below::read_extent;
use crate::layered_bitmaps::LayeredBitmaps;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, ImageId, ImageInfo, MemberRole, ParentStage};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{Bitmap, BlockIo, Content, DirtyRanges, DriverError, DriverResult, Extent, Extents, Source};

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
    ahead: Extents,
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

/// Where what is seen comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The layer that it is seen in: 0 is the top-most.
    pub depth: u32,
    /// What stands there, from this place on; `None` where no layer holds it.
    pub content: Option<Content>,
}

impl Place {
    /// Whether what is `length` bytes behind it is a part of the same run: in the same layer, of the same kind, and of plain
    /// data, behind it on the same device.
    #[must_use]
    pub fn is_followed_by(&self, length: u64, next: &Self) -> bool {
        let same_kind = self.content.map(|content| content.kind()) == next.content.map(|content| content.kind());
        let behind = match self.content {
            Some(content @ Content::Data { .. }) => content.after(length) == next.content,
            _ => same_kind,
        };
        self.depth == next.depth && behind
    }

    /// Its kind as messages to the host have it: an [`ExtentKind`](instar_guest_sdk::abi::ExtentKind) as a number; 0 where no
    /// layer holds it.
    #[must_use]
    pub fn kind(&self) -> u32 {
        self.content.map_or(0, |content| content.kind() as u32)
    }

    /// Device and byte offset of plain data, as messages to the host have them; else zeroes.
    #[must_use]
    pub fn on_device(&self) -> (u32, u64) {
        match self.content {
            Some(Content::Data { device, offset }) => (device, offset),
            _ => (0, 0),
        }
    }
}

/// The layers, as one.
pub struct Layers<'a> {
    layers: Vec<Layer<'a>>,
    /// The guest byte up to which extents were handed out.
    position: u64,
    /// The extents behind the `Encoded` ones that were handed out last, each with the index of its layer.
    encoded: Vec<(usize, Extent)>,
    /// Which bitmaps of the layers are seen as one.
    bitmaps: LayeredBitmaps,
}

impl<'a> Layer<'a> {
    /// At most `look_ahead` extents are asked of the source at once.
    fn new(source: Box<dyn Source + 'a>, look_ahead: usize) -> Self {
        let size = source.info().virtual_size;
        Self { source, size, ahead: Extents::with_room_for(look_ahead), first: 0, next: 0 }
    }

    /// Begin again so that what is held from guest byte `from` on will be found.
    fn restart(&mut self, from: u64) {
        self.ahead.clear();
        self.first = 0;
        self.next = self.start_of_cluster(from);
    }

    /// Where enumerating can begin to find what is held at guest byte `at`.
    fn start_of_cluster(&self, at: u64) -> u64 {
        at - at % self.source.info().cluster_size.max(1)
    }

    /// The first extent that ends past guest byte `from`, if it begins before `end`; `from` does not go back.
    fn peek(&mut self, io: &mut dyn BlockIo, from: u64, end: u64) -> DriverResult<Option<Extent>> {
        loop {
            while let Some(extent) = self.ahead.get(self.first) {
                if extent.end() > from {
                    return Ok(Some(*extent));
                }
                self.first += 1;
            }
            let end = end.min(self.size);
            if self.next >= end {
                return Ok(None);
            }
            // What the layers above hide is not enumerated. But it goes on within a cluster: that may hold more extents before
            // `from` than are asked for at once.
            if self.next < self.start_of_cluster(from) {
                self.restart(from);
            }
            self.ahead.clear();
            self.first = 0;
            let next = self.source.extents(io, self.next..end, &mut self.ahead)?;
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
        let layers = layers.into_iter().map(|source| Layer::new(source, look_ahead)).collect();
        Self { layers, position: 0, encoded: Vec::new(), bitmaps: LayeredBitmaps::default() }
    }

    /// Begin again, so that what is seen from guest byte `from` on can be asked for.
    pub fn rewind(&mut self, from: u64) {
        self.layers.iter_mut().for_each(|layer| layer.restart(from));
    }

    /// Verify each of them.
    ///
    /// # Errors
    /// Those of the sources.
    pub fn verify_each(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.verify_each_or(io, &mut Err)
    }

    /// Verify each of them; what is wrong with one goes to `wrong`, which may pass it over.
    ///
    /// # Errors
    /// Those of `wrong`.
    pub fn verify_each_or(
        &mut self,
        io: &mut dyn BlockIo,
        wrong: &mut dyn FnMut(DriverError) -> DriverResult<()>,
    ) -> DriverResult<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.source.verify(io, false).map(drop).or_else(&mut *wrong))
    }

    /// The top-most of them.
    pub fn top(&mut self) -> Option<&mut (dyn Source + 'a)> {
        self.layers.first_mut().map(|layer| layer.source.as_mut())
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
            match layer.peek(io, at, limit)? {
                Some(extent) if extent.guest_offset <= at => {
                    return Ok((Seen::Held(index, extent), end.min(extent.end())));
                }
                Some(extent) => end = end.min(extent.guest_offset),
                None => {}
            }
        }
        Ok((Seen::Nothing, end))
    }

    /// The same of the disk that they are, which has nothing past its end: up to a byte behind `at`.
    ///
    /// # Errors
    /// As [`seen`](Self::seen); [`ErrorCode::InternalOverflow`] for layers that do not advance.
    pub fn seen_on_disk(&mut self, io: &mut dyn BlockIo, at: u64, limit: u64) -> DriverResult<(Seen, u64)> {
        let size = self.layers.first().map_or(0, |top| top.size);
        if at >= size {
            return Ok((Seen::Nothing, limit));
        }
        let (seen, end) = self.seen(io, at, limit.min(size))?;
        if end <= at {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "the layers do not advance"));
        }
        Ok((seen, end))
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
        let place = |index: usize, content| Place { depth: u32::try_from(index).unwrap_or(u32::MAX), content };
        match seen {
            Seen::Nothing => place(self.layers.len().saturating_sub(1), None),
            // The layer with this index has ended: it is the one above that reads as zeroes.
            Seen::Zeroes(index) => place(index.saturating_sub(1), None),
            Seen::Held(index, extent) => {
                let part = extent.clip(at..extent.end()).unwrap_or(extent);
                place(index, Some(part.content))
            }
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
        match seen {
            Seen::Nothing => None,
            Seen::Zeroes(_) => Some(Extent::zero(at, end - at)),
            Seen::Held(index, whole) => {
                let part = whole.clip(at..end)?;
                if !part.is_encoded() {
                    return Some(part);
                }
                self.encoded.push((index, whole));
                Some(Extent::encoded(at, end - at, self.encoded.len() as u64 - 1))
            }
        }
    }
}

impl Source for Layers<'_> {
    fn info(&self) -> ImageInfo {
        self.layers.first().map(|layer| layer.source.info()).unwrap_or_default()
    }

    /// Returns how many clusters of the overlay's cluster size the layers hold together.
    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "several layers cannot be emptied"));
        }
        self.verify_each(io)?;
        let ImageInfo { virtual_size, cluster_size } = self.info();
        let unit = cluster_size.max(1);
        let (mut clusters, mut counted) = (0, 0);
        let (mut from, mut extents) = (0, Extents::with_room_for(LOOK_AHEAD));
        while from < virtual_size {
            extents.clear();
            from = self.extents(io, from..virtual_size, &mut extents)?;
            for extent in extents.iter() {
                let first = (extent.guest_offset / unit).max(counted);
                counted = extent.end().div_ceil(unit);
                clusters += counted.saturating_sub(first);
            }
        }
        Ok(clusters)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let from = range.start;
        if from < self.position {
            self.layers.iter_mut().for_each(|layer| layer.restart(from));
        }
        self.encoded.clear();
        let limit = range.end.min(self.info().virtual_size);
        let mut at = from;
        while at < limit {
            let (seen, end) = self.seen(io, at, limit)?;
            if end <= at {
                return Err(DriverError::new(ErrorCode::InternalOverflow, "the layers do not advance"));
            }
            if self.part(seen, at, end).is_some_and(|extent| !out.push(extent)) {
                break;
            }
            at = end;
        }
        self.position = at;
        Ok(at)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let index = match extent.content {
            Content::Encoded { location } => usize::try_from(location).ok(),
            _ => None,
        };
        let held = index.and_then(|index| self.encoded.get(index).copied());
        let layer = held.and_then(|(index, whole)| Some((self.layers.get_mut(index)?, whole)));
        let (layer, whole) =
            layer.ok_or_else(|| DriverError::new(ErrorCode::InternalOverflow, "an extent of before"))?;
        layer.source.read(io, &whole, from, buffer)
    }

    /// That of the lowest layer: what is below it changes.
    fn identity(&self) -> Option<ImageId> {
        self.layers.last().and_then(|lowest| lowest.source.identity())
    }

    /// The lowest layer is the one whose parent is written.
    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.layers.last_mut().map_or(Ok(()), |lowest| lowest.source.follow_parent(io, identity, stage))
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Err(DriverError::new(ErrorCode::InternalOverflow, "several layers cannot be emptied"))
    }

    /// Each name that any layer has, in the order of the layers, as one bitmap.
    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        let lists = self.layers.iter_mut().map(|layer| layer.source.bitmaps(io)).collect::<DriverResult<Vec<_>>>()?;
        self.bitmaps = LayeredBitmaps::new(&lists);
        Ok(self.bitmaps.seen(&lists))
    }

    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        let size = self.info().virtual_size;
        let Self { layers, bitmaps, .. } = self;
        bitmaps.dirty(
            &mut |layer, own, out| {
                let layer = layers.get_mut(layer).filter(|layer| from < layer.size);
                // What lies past the end of a layer is in none of its bitmaps.
                layer.map_or(Ok(size), |layer| match layer.source.dirty(io, own, from, out)? {
                    next if next >= layer.size => Ok(size.max(next)),
                    next => Ok(next),
                })
            },
            index,
            size,
            out,
        )
    }
}
