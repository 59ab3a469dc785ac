//! Compressed clusters that are decoded before they are asked for.
//!
//! A reader enumerates a layer first, and then mostly asks for one cluster after the other. So the clusters that come next are
//! known: their streams are read in one go, in the order of the file, and all processors decode them while the main one hands out
//! those of before, and while the host writes these. There are two batches: the one that clusters are taken from, and the one
//! that is being decoded.
//!
//! Nothing here decides what a cluster holds. One that was not decoded, whatever the reason, is left to its driver, which reads
//! and decodes it alone and has the error to tell: a damaged cluster is an error only for who asks for it. And nothing depends on how many processors there are: one processor asks for
//! the same streams, and decodes a cluster when it is taken.

use crate::abi::Request;
use crate::background::Background;
use crate::crew::Crew;
use crate::error::{overflow, DriverResult};
use crate::io::BlockIo;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

/// Bytes of the clusters of a batch, at first …
const FIRST: usize = 512 << 10;
/// … and at most, as long as all clusters of a batch are taken. Two batches and their streams are in memory.
const MOST: usize = 2 << 20;
/// Clusters of a batch, even where they take more than that …
const LEAST_CLUSTERS: usize = 4;
/// … as far as they take no more bytes than this.
const MOST_OF_LARGE: usize = 4 << 20;
/// A batch is begun while as much of the heap is free: all images share it, and the target.
const ROOM: usize = 20 << 20;
/// Bytes between two streams that are read with them rather than with a request more.
const GAP: u64 = 16 << 10;
/// Memory for streams is taken in these units of bytes, so that it fits the next batch, too.
const GRANULE: usize = 256 << 10;
/// Compressed clusters that are remembered of an enumeration, at most: an operation enumerates half as many before it asks for the
/// first.
const REMEMBERED: usize = 1 << 15;

/// Decodes the compressed clusters of an image, on one of the processors.
pub trait Decoder: Send + 'static {
    /// Decode the cluster at guest offset `guest` from `stream`, the bytes of its [noted](DecodeAhead::note) range, into `cluster`,
    /// whose content is arbitrary. Returns whether that succeeded. It must not allocate or free memory: see
    /// [`Crew::for_each`](crate::Crew::for_each).
    fn decode(&mut self, guest: u64, stream: &[u8], cluster: &mut [u8]) -> bool;

    /// Whether there was memory for it.
    fn has_memory(&self) -> bool {
        true
    }
}

/// A compressed cluster, as it was enumerated.
#[derive(Clone, Copy)]
struct Known {
    guest: u64,
    location: u64,
    /// The file offset of the stream, and its length in bytes.
    start: u64,
    length: usize,
}

/// A cluster of a batch.
struct Item {
    known: Known,
    /// The streams of the batch; that of this cluster begins at byte `at`.
    streams: Arc<Vec<u8>>,
    at: usize,
    /// Its bytes, if several processors decode.
    cluster: Vec<u8>,
    is_decoded: bool,
}

impl Item {
    fn stream(&self) -> &[u8] {
        self.streams.get(self.at..self.at.saturating_add(self.known.length)).unwrap_or_default()
    }

    fn decode(&mut self, decoder: &mut impl Decoder) {
        let mut cluster = core::mem::take(&mut self.cluster);
        self.is_decoded = decoder.decode(self.known.guest, self.stream(), &mut cluster);
        self.cluster = cluster;
    }
}

/// What was enumerated of one image, what was decoded of it, and who decodes.
///
/// A [`Source`](crate::Source) tells it what it enumerates, and asks it for whole clusters before it decodes them itself:
///
/// ```
/// use instar_guest_sdk::{BlockIo, DecodeAhead, Decoder, DriverResult};
///
/// /// Streams of one byte, which fills the cluster.
/// #[derive(Default)]
/// struct Fill;
///
/// impl Decoder for Fill {
///     fn decode(&mut self, _: u64, stream: &[u8], cluster: &mut [u8]) -> bool {
///         stream.first().map(|&byte| cluster.fill(byte)).is_some()
///     }
/// }
///
/// fn enumerate(ahead: &mut DecodeAhead<Fill>, offsets: &[u64]) {
///     ahead.enumerate(0);
///     for (guest, &offset) in (0..).step_by(4096).zip(offsets) {
///         ahead.note(guest, offset, offset..offset + 1);
///     }
/// }
///
/// fn read(io: &mut dyn BlockIo, ahead: &mut DecodeAhead<Fill>, guest: u64, offset: u64) -> DriverResult<Vec<u8>> {
///     let mut cluster = vec![0; 4096];
///     if !ahead.take(io, 0, (guest, offset), &mut cluster, &Fill::default)? {
///         // Read and decode it, or say why that fails.
///         let mut stream = [0];
///         io.read(0, offset, &mut stream)?;
///         cluster.fill(stream[0]);
///     }
///     Ok(cluster)
/// }
/// ```
pub struct DecodeAhead<D: Decoder> {
    /// Ascending.
    known: Vec<Known>,
    /// The guest offset that was asked for last.
    last: Option<u64>,
    decoders: Option<Decoders<D>>,
    current: Vec<Item>,
    /// How many of these were taken, and the place behind the last one.
    taken: usize,
    place: usize,
    /// The guest offsets of the first and the last cluster of the next batch, if there is one.
    next: Option<(u64, u64)>,
    /// Bytes of the clusters of the next batch.
    bytes: usize,
}

struct Decoders<D: Decoder> {
    /// They decode the next batch, if there are several.
    background: Background<D, Item>,
    /// The next batch, if there is one processor.
    waiting: Vec<Item>,
}

impl<D: Decoder> Default for DecodeAhead<D> {
    fn default() -> Self {
        let (known, current) = (Vec::new(), Vec::new());
        Self { known, last: None, decoders: None, current, taken: 0, place: 0, next: None, bytes: FIRST }
    }
}

impl<D: Decoder> DecodeAhead<D> {
    /// Begin to enumerate the image again from guest byte `from` on. The clusters before it stay: a reader that looks ahead, as
    /// a view of layers does, asks for them later.
    pub fn enumerate(&mut self, from: u64) {
        let before = self.known.partition_point(|known| known.guest < from);
        self.known.truncate(before);
    }

    /// The next compressed cluster of the enumeration, at guest offset `guest`: where the driver finds it again, and the bytes of
    /// the file that hold its stream, and what else the decoder is to see. The range may be longer than the stream; past the end
    /// of the file, the decoder sees zeroes.
    pub fn note(&mut self, guest: u64, location: u64, range: Range<u64>) {
        let length = range.end.checked_sub(range.start).and_then(|length| usize::try_from(length).ok());
        let Some(length) = length.filter(|_| self.known.last().is_none_or(|last| last.guest < guest)) else { return };
        if self.known.len() >= REMEMBERED {
            self.known.drain(..REMEMBERED / 2);
        }
        self.known.push(Known { guest, location, start: range.start, length });
    }

    /// The decoder of this processor, made with `new` if need be.
    pub fn own(&mut self, io: &dyn BlockIo, new: &dyn Fn() -> D) -> Option<&mut D> {
        self.decoders(io, new).background.own()
    }

    /// Fill `cluster` with the one at guest offset `guest` that stands at `location`, if it was decoded or is now, together with
    /// those that come next on this `device`. Returns `false` if it was not; then the content of `cluster` is arbitrary, and the
    /// driver decodes it alone. All calls are for clusters of the same size.
    ///
    /// # Errors
    /// I/O errors, also for streams of clusters that come next.
    pub fn take(
        &mut self,
        io: &mut dyn BlockIo,
        device: u32,
        (guest, location): (u64, u64),
        cluster: &mut [u8],
        new: &dyn Fn() -> D,
    ) -> DriverResult<bool> {
        let before = self.last.replace(guest);
        if self.place_of(guest, location).is_none() {
            if self.next.is_none_or(|(first, last)| guest < first || guest > last) {
                let Some(at) = self.follows(guest, location, before) else { return Ok(false) };
                if self.taken < self.current.len() {
                    self.bytes = FIRST;
                }
                self.begin(io, device, at, cluster.len(), (new, Vec::new()))?;
            }
            self.advance(io, device, cluster.len(), new)?;
        }
        let Some(place) = self.place_of(guest, location) else { return Ok(false) };
        (self.place, self.taken) = (place + 1, self.taken + 1);
        let Some(item) = self.current.get(place) else { return Ok(false) };
        if item.cluster.len() == cluster.len() && item.is_decoded {
            cluster.copy_from_slice(&item.cluster);
            return Ok(true);
        }
        let alone = self.decoders.as_mut().filter(|decoders| decoders.background.processors() == 1);
        let decoder = alone.and_then(|decoders| decoders.background.own());
        Ok(decoder.is_some_and(|decoder| decoder.decode(guest, item.stream(), cluster)))
    }

    /// Where a cluster stands in the batch that clusters are taken from. Mostly, they are taken in order.
    fn place_of(&self, guest: u64, location: u64) -> Option<usize> {
        let is_it = |place: &usize| {
            let known = self.current.get(*place).map(|item| item.known);
            known.is_some_and(|known| (known.guest, known.location) == (guest, location))
        };
        let found = || self.current.binary_search_by_key(&guest, |item| item.known.guest).ok();
        Some(self.place).filter(is_it).or_else(|| found().filter(is_it))
    }

    /// The place in the enumeration of a cluster that is asked for right behind the one before it, or first.
    fn follows(&self, guest: u64, location: u64, before: Option<u64>) -> Option<usize> {
        let at = self.known.binary_search_by_key(&guest, |known| known.guest).ok()?;
        let is_it = self.known.get(at).is_some_and(|known| known.location == location);
        let previous = at.checked_sub(1).and_then(|at| self.known.get(at));
        (is_it && previous.is_none_or(|known| Some(known.guest) == before)).then_some(at)
    }

    /// Make the next batch the one that clusters are taken from, and begin with the one behind it.
    fn advance(&mut self, io: &mut dyn BlockIo, device: u32, size: usize, new: &dyn Fn() -> D) -> DriverResult<()> {
        if self.next.take().is_none() {
            return Ok(());
        }
        // Who leaves out clusters does not want many.
        let all = self.taken >= self.current.len();
        self.bytes = if all { self.bytes.saturating_mul(2).min(MOST) } else { FIRST };
        let decoders = self.decoders(io, new);
        let alone = decoders.background.processors() == 1;
        let items = if alone { core::mem::take(&mut decoders.waiting) } else { decoders.background.end() };
        let old = core::mem::replace(&mut self.current, items);
        (self.taken, self.place) = (0, 0);
        let Some(last) = self.current.last().map(|item| item.known.guest) else { return Ok(()) };
        let at = self.known.partition_point(|known| known.guest <= last);
        self.begin(io, device, at, size, (new, old))
    }

    /// Begin with a batch of clusters of `size` bytes from place `at` of the enumeration on, with the memory of the `old` items.
    fn begin(
        &mut self,
        io: &mut dyn BlockIo,
        device: u32,
        at: usize,
        size: usize,
        (new, old): (&dyn Fn() -> D, Vec<Item>),
    ) -> DriverResult<()> {
        let alone = self.decoders(io, new).background.processors() == 1;
        let held: usize = old.iter().map(|item| item.cluster.len()).sum();
        let held = held + old.first().map_or(0, |item| item.streams.len());
        if io.heap_free().saturating_add(held) < ROOM || size == 0 {
            return Ok(());
        }
        let bytes = self.bytes.max(size.saturating_mul(LEAST_CLUSTERS).min(MOST_OF_LARGE));
        let mut room = bytes.saturating_add(bytes / 4);
        let next = self.known.get(at..).unwrap_or_default().iter().take((bytes / size).max(1));
        let next: Vec<Known> = next
            .map_while(|known| {
                room = room.checked_sub(known.length)?;
                Some(*known)
            })
            .collect();
        let (mut buffers, mut streams) = (Vec::with_capacity(old.len()), Vec::new());
        for item in old {
            buffers.push(item.cluster);
            // The last one that goes away leaves it.
            streams = Arc::into_inner(item.streams).unwrap_or(streams);
        }
        let (streams, places) = read(io, device, &next, streams)?;
        let streams = Arc::new(streams);
        let item = |(known, at): (Known, usize)| {
            let cluster = if alone { Vec::new() } else { buffers.pop().unwrap_or_else(|| vec![0; size]) };
            Item { known, streams: Arc::clone(&streams), at, cluster, is_decoded: false }
        };
        let items: Vec<Item> = next.into_iter().zip(places).map(item).collect();
        let range = items.first().zip(items.last()).map(|(first, last)| (first.known.guest, last.known.guest));
        let Some(decoders) = self.decoders.as_mut().filter(|_| range.is_some()) else { return Ok(()) };
        self.next = range;
        if alone {
            decoders.waiting = items;
        } else {
            decoders.background.begin(items, |decoder, item| item.decode(decoder));
        }
        Ok(())
    }

    fn decoders(&mut self, io: &dyn BlockIo, new: &dyn Fn() -> D) -> &mut Decoders<D> {
        self.decoders.get_or_insert_with(|| {
            let others = if io.heap_free() < ROOM { 0 } else { usize::MAX };
            let crew = Crew::new(new(), others, || Some(new()).filter(D::has_memory));
            Decoders { background: Background::new(crew), waiting: Vec::new() }
        })
    }
}

impl<D: Decoder> fmt::Debug for DecodeAhead<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecodeAhead")
            .field("known", &self.known.len())
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// Read the streams of some clusters into `buffer`, in the order of the file and those that are close to each other at once, and
/// say where each begins.
fn read(
    io: &mut dyn BlockIo,
    device: u32,
    clusters: &[Known],
    mut buffer: Vec<u8>,
) -> DriverResult<(Vec<u8>, Vec<usize>)> {
    let mut sorted: Vec<(usize, Known)> = clusters.iter().copied().enumerate().collect();
    sorted.sort_unstable_by_key(|(_, known)| known.start);
    // Ranges of the file, and the places in the buffer at which they stand.
    let mut ranges: Vec<(Range<u64>, u64)> = Vec::new();
    let (mut places, mut length) = (vec![0; clusters.len()], 0_u64);
    for (index, known) in sorted {
        let end = known.start.saturating_add(known.length as u64);
        match ranges.last_mut() {
            Some((range, _)) if known.start <= range.end.saturating_add(GAP) => {
                length = length.saturating_add(end.saturating_sub(range.end));
                range.end = range.end.max(end);
            }
            _ => {
                ranges.push((known.start..end, length));
                length = length.saturating_add(known.length as u64);
            }
        }
        if let Some(((range, at), place)) = ranges.last().zip(places.get_mut(index)) {
            *place =
                usize::try_from(at + (known.start - range.start)).map_err(|_| overflow("the place of a stream"))?;
        }
    }
    let length = usize::try_from(length).map_err(|_| overflow("the length of streams"))?;
    if buffer.len() < length {
        // The old one goes first.
        drop(buffer);
        buffer = vec![0; length.checked_next_multiple_of(GRANULE).ok_or_else(|| overflow("the length of streams"))?];
    }
    let base = buffer.as_mut_ptr() as u64;
    let ranges = ranges.into_iter().filter(|(range, _)| !range.is_empty());
    let mut requests: Vec<Request> =
        ranges.map(|(range, at)| Request::read(device, range.start, base + at, range.end - range.start)).collect();
    if !requests.is_empty() {
        io.run(&mut requests)?;
    }
    Ok((buffer, places))
}

#[cfg(all(test, feature = "memory"))]
#[path = "decode_ahead_tests.rs"]
mod tests;
