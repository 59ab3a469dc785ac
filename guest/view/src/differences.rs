//! What an overlay has to hold itself before another image may be below it: where it holds nothing, and the two images that
//! may be below it do not read the same, what the present one reads.
//!
//! It is a [`Source`], so that whatever writes extents can write these.

use crate::layers::{Layers, Seen};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, ImageInfo, Request};
use instar_guest_sdk::{BlockIo, Content, DriverError, DriverResult, Extent, Extents, Source};

/// Bytes that are read of each side at once.
const CHUNK: u64 = 1 << 20;
/// The least that is compared as one piece, in bytes.
const SECTOR: u64 = 512;
/// Of the heap that is free, the places that differ may take this part.
const SHARE: usize = 4;

/// What may be below the overlay: layers as one disk, which reads as zeroes past its end.
pub struct View<'a> {
    layers: Layers<'a>,
    /// The device of each layer, by which a layer of the other view is known to be the same one.
    devices: Vec<u32>,
}

impl<'a> View<'a> {
    /// These layers, each with its device, the top-most first; none for a disk of zeroes.
    #[must_use]
    pub fn new(layers: Vec<(u32, Box<dyn Source + 'a>)>) -> Self {
        let (devices, layers) = layers.into_iter().unzip();
        Self { layers: Layers::new(layers), devices }
    }

    /// The device of the layer that is seen; `None` for zeroes.
    fn holder(&self, seen: Seen) -> Option<u32> {
        match seen {
            Seen::Held(_, Extent { content: Content::Zero, .. }) | Seen::Nothing | Seen::Zeroes(_) => None,
            Seen::Held(index, _) => self.devices.get(index).copied(),
        }
    }
}

/// What is known of zeroes in a range of one view: up to which byte it is zeroes, and from there up to which it is data.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    zeroes: u64,
    data: u64,
}

impl Known {
    /// What the host knows of what is seen at `at`, up to `end` at most.
    fn ask(io: &mut dyn BlockIo, seen: Seen, at: u64, end: u64) -> DriverResult<Self> {
        let all_zeroes = Self { zeroes: end, data: end };
        let Seen::Held(_, extent) = seen else { return Ok(all_zeroes) };
        match extent.clip(at..end).map(|part| part.content) {
            Some(Content::Zero) => Ok(all_zeroes),
            Some(Content::Data { device, offset }) => {
                let found = io.next_data(device, offset..offset.saturating_add(end - at))?;
                if found.is_empty() {
                    return Ok(all_zeroes);
                }
                let place = |byte: u64| at.saturating_add(byte.saturating_sub(offset)).min(end);
                Ok(Self { zeroes: place(found.start), data: place(found.end) })
            }
            _ => Ok(Self { zeroes: at, data: end }),
        }
    }

    /// The same, asked only past what is known.
    fn renew(&mut self, io: &mut dyn BlockIo, seen: Seen, at: u64, end: u64) -> DriverResult<u64> {
        if at >= self.data {
            *self = Self::ask(io, seen, at, end)?;
        }
        Ok(self.zeroes.max(at))
    }
}

/// Where plain data that is seen at `at` stands.
fn plain(seen: Seen, at: u64) -> Option<(u32, u64)> {
    let Seen::Held(_, extent) = seen else { return None };
    match extent.clip(at..extent.end())?.content {
        Content::Data { device, offset } => Some((device, offset)),
        _ => None,
    }
}

/// The differences between two views, where the overlay holds nothing.
pub struct Differences<'a> {
    /// The overlay as it was before the first change: it is looked at only while nothing is changed.
    overlay: Layers<'a>,
    old: View<'a>,
    new: View<'a>,
    info: ImageInfo,
    /// Guest bytes that differ, ascending, once they are known, and whether the old view reads zeroes there, however it holds
    /// them: those take no space.
    places: Vec<(Range<u64>, bool)>,
    /// Guest bytes that do not differ, where the old view reads zeroes: those that were found last.
    blank: Range<u64>,
    /// The guest byte up to which extents were handed out.
    position: u64,
    /// What is behind the `Encoded` extents that were handed out last.
    encoded: Vec<Seen>,
}

impl<'a> Differences<'a> {
    /// Those of an overlay that gets `new` below it, in place of `old`.
    #[must_use]
    pub fn new(overlay: Box<dyn Source + 'a>, old: View<'a>, new: View<'a>) -> Self {
        let info = overlay.info();
        let overlay = Layers::new(vec![overlay]);
        Self { overlay, old, new, info, places: Vec::new(), blank: 0..0, position: 0, encoded: Vec::new() }
    }

    /// Find all places where the overlay holds nothing and the two views differ.
    fn find(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let size = self.info.virtual_size;
        let most = io.heap_free() / SHARE / size_of::<(Range<u64>, bool)>();
        let mut buffers = [Vec::new(), Vec::new()];
        let mut at = 0;
        while at < size {
            let (held, end) = self.overlay.seen(io, at, size)?;
            if end <= at {
                return Err(DriverError::new(ErrorCode::InternalOverflow, "the overlay does not advance"));
            }
            if !matches!(held, Seen::Nothing) {
                at = end;
                continue;
            }
            let (one, end) = self.old.layers.seen_on_disk(io, at, end)?;
            let (two, end) = self.new.layers.seen_on_disk(io, at, end)?;
            // The same layer has the same bytes at the same place: that is how a layer is dropped from a chain at little cost.
            match (self.old.holder(one), self.new.holder(two)) {
                (None, None) => self.is_blank(at..end),
                (old, new) if old == new => {}
                _ => self.compare(io, [one, two], at..end, &mut buffers)?,
            }
            if self.places.len() > most {
                let text = format!(
                    "the two backing files differ in more than {most} places that the overlay does not hold: copy the image \
                     as a whole instead"
                );
                return Err(DriverError::new(ErrorCode::UnsupportedFormat, text));
            }
            at = end;
        }
        Ok(())
    }

    /// Compare what both views have in a range, in pieces as the overlay allocates them.
    fn compare(
        &mut self,
        io: &mut dyn BlockIo,
        seen: [Seen; 2],
        range: Range<u64>,
        buffers: &mut [Vec<u8>; 2],
    ) -> DriverResult<()> {
        let unit = self.info.cluster_size.max(SECTOR);
        let mut at = range.start;
        let mut known = [Known::default(); 2];
        while at < range.end {
            let [one, two] = seen;
            let zeroes = known[0].renew(io, one, at, range.end)?.min(known[1].renew(io, two, at, range.end)?);
            if zeroes > at {
                self.is_blank(at..zeroes);
                at = zeroes;
                continue;
            }
            let end = (at - at % CHUNK).saturating_add(CHUNK).min(range.end);
            let length = usize::try_from(end - at).unwrap_or(0);
            buffers.iter_mut().for_each(|buffer| buffer.resize(length, 0));
            let [first, second] = buffers;
            match (plain(one, at), plain(two, at)) {
                (Some(of_first), Some(of_second)) => {
                    // Both with one doorbell, which takes as long as to read and compare some hundred KiB.
                    let read = |(device, offset), buffer: &mut Vec<u8>| {
                        Request::read(device, offset, buffer.as_mut_ptr() as u64, buffer.len() as u64)
                    };
                    io.run(&mut [read(of_first, first), read(of_second, second)])?;
                }
                _ => {
                    self.old.layers.read_seen(io, one, at, first)?;
                    self.new.layers.read_seen(io, two, at, second)?;
                }
            }
            let mut done = 0;
            while done < length {
                let from = at.saturating_add(done as u64);
                let next = (from - from % unit).saturating_add(unit).min(end);
                let after = usize::try_from(next - at).unwrap_or(length);
                let kept = first.get(done..after).unwrap_or_default();
                let zeroes = kept.iter().all(|&byte| byte == 0);
                if second.get(done..after) != Some(kept) {
                    self.differs(from..next, zeroes);
                } else if zeroes {
                    self.is_blank(from..next);
                }
                done = after;
            }
            at = end;
        }
        Ok(())
    }

    /// What differs is written. Zeroes take no space where they are a whole cluster, so that those around them join them.
    fn differs(&mut self, range: Range<u64>, zeroes: bool) {
        let unit = self.info.cluster_size.max(SECTOR);
        let mut start = range.start;
        if zeroes && self.blank.end == start {
            start = self.blank.start.max(start - start % unit);
        }
        match self.places.last_mut() {
            Some((last, same)) if last.end >= start && *same == zeroes => last.end = range.end,
            _ => self.places.push((start..range.end, zeroes)),
        }
    }

    /// A range does not differ, and the old view reads zeroes there.
    fn is_blank(&mut self, range: Range<u64>) {
        let unit = self.info.cluster_size.max(SECTOR);
        if let Some((last, true)) = self.places.last_mut() {
            if last.end == range.start && last.end % unit != 0 {
                last.end = last.end.next_multiple_of(unit).min(range.end);
            }
        }
        let start = if self.blank.end == range.start { self.blank.start } else { range.start };
        self.blank = start..range.end;
    }

    /// A part of what the old view reads, as an extent.
    fn part(&mut self, seen: Seen, at: u64, end: u64) -> Extent {
        let zero = Extent::zero(at, end - at);
        let Seen::Held(_, whole) = seen else { return zero };
        let Some(part) = whole.clip(at..end) else { return zero };
        if !part.is_encoded() {
            return part;
        }
        self.encoded.push(seen);
        Extent::encoded(at, end - at, self.encoded.len() as u64 - 1)
    }
}

impl Source for Differences<'_> {
    fn info(&self) -> ImageInfo {
        self.info
    }

    /// Finds the differences. Returns how many clusters of the overlay they touch.
    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "differences cannot be emptied"));
        }
        self.overlay.verify(io, false)?;
        self.overlay.rewind(0);
        self.find(io)?;
        let unit = self.info.cluster_size.max(1);
        let (mut clusters, mut counted) = (0, 0);
        for (place, _) in &self.places {
            let first = (place.start / unit).max(counted);
            counted = place.end.div_ceil(unit);
            clusters += counted.saturating_sub(first);
        }
        Ok(clusters)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        if range.start < self.position || self.position == 0 {
            self.old.layers.rewind(range.start);
        }
        self.encoded.clear();
        let mut index = self.places.partition_point(|(place, _)| place.end <= range.start);
        while let Some((place, zeroes)) = self.places.get(index).cloned().filter(|(place, _)| place.start < range.end) {
            let (mut at, limit) = (place.start.max(range.start), place.end.min(range.end));
            while at < limit {
                let (seen, end) =
                    if zeroes { (Seen::Nothing, limit) } else { self.old.layers.seen_on_disk(io, at, limit)? };
                let extent = self.part(seen, at, end);
                if !out.push(extent) {
                    self.position = at;
                    return Ok(at);
                }
                at = end;
            }
            index += 1;
        }
        self.position = range.end;
        Ok(range.end)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let index = match extent.content {
            Content::Encoded { location } => usize::try_from(location).ok(),
            _ => None,
        };
        let seen = index.and_then(|index| self.encoded.get(index).copied());
        let seen = seen.ok_or_else(|| DriverError::new(ErrorCode::InternalOverflow, "an extent of before"))?;
        self.old.layers.read_seen(io, seen, from, buffer)
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Err(DriverError::new(ErrorCode::InternalOverflow, "differences cannot be emptied"))
    }
}
