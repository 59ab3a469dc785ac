//! Compressed clusters that are decoded before they are asked for, side by side.
//!
//! A reader enumerates a layer first, and then asks for one cluster after the other. The streams of the next clusters are mostly
//! in memory already, read ahead together with that of the requested one, so all processors decode at once. No request is made
//! for that, and a stream that does not decode is an error only for the request that asks for its cluster: with one processor,
//! which decodes just the requested cluster, the requests and the errors are the same.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{BlockIo, Crew};
use instar_qcow2_format::{CompressedRange, DecodeError, Decompressor};

/// Bytes of clusters that are decoded before they are asked for, at most.
const MOST: usize = 2 << 20;
/// Decoding ahead is for a guest that has as much heap as this: images share it.
const ROOM: usize = 16 << 20;
/// Compressed clusters that are remembered of an enumeration, at most.
const REMEMBERED: usize = 4096;

/// A compressed cluster, as it was enumerated.
#[derive(Clone, Copy)]
struct Known {
    guest: u64,
    descriptor: u64,
}

/// A cluster that was decoded, or does not decode.
struct Decoded {
    descriptor: u64,
    result: Result<(), DecodeError>,
}

/// A stream on its way to a cluster.
struct Item<'a> {
    stream: &'a [u8],
    cluster: &'a mut [u8],
    result: Result<(), DecodeError>,
}

/// What was enumerated, what was decoded of it, and who decodes.
#[derive(Default)]
pub(super) struct Ahead {
    /// Ascending.
    known: Vec<Known>,
    /// The cluster that was asked for last.
    last: Option<u64>,
    decoders: Option<Crew<Decompressor>>,
    /// Of each of these, `bytes` has a cluster.
    decoded: Vec<Decoded>,
    /// The place behind the one that was taken last.
    taken: usize,
    bytes: Vec<u8>,
}

impl Ahead {
    /// Begin to enumerate the image again from guest byte `from` on. The clusters before it stay: a reader that looks ahead, as
    /// a view of layers does, asks for them later.
    pub(super) fn enumerate(&mut self, from: u64) {
        let before = self.known.partition_point(|known| known.guest < from);
        self.known.truncate(before);
    }

    /// The next compressed cluster of the enumeration.
    pub(super) fn note(&mut self, guest: u64, descriptor: u64) {
        if self.known.len() >= REMEMBERED {
            self.known.drain(..REMEMBERED / 2);
        }
        if self.known.last().is_none_or(|last| last.guest < guest) {
            self.known.push(Known { guest, descriptor });
        }
    }

    /// Take a cluster that was decoded already, or why it could not be.
    pub(super) fn take(&mut self, descriptor: u64, cluster: &mut [u8]) -> Option<Result<(), DecodeError>> {
        let is_it = |place: &usize| self.decoded.get(*place).is_some_and(|decoded| decoded.descriptor == descriptor);
        // Mostly, they are taken in order.
        let place = Some(self.taken).filter(is_it).or_else(|| (0..self.decoded.len()).find(is_it))?;
        let decoded = self.decoded.get(place)?;
        self.taken = place + 1;
        if decoded.result.is_ok() {
            cluster.copy_from_slice(self.bytes.chunks_exact(cluster.len()).nth(place)?);
        }
        Some(decoded.result)
    }

    /// Decode the cluster at guest offset `guest` from `stream`, a part of `input`, which are the bytes of the file from
    /// `input_at` on; and with it those that come next, as far as their streams are in `input`.
    pub(super) fn decode(
        &mut self,
        io: &dyn BlockIo,
        image: &Image,
        (guest, descriptor): (u64, u64),
        (input, input_at, stream): (&[u8], u64, Range<usize>),
        cluster: &mut [u8],
    ) -> Result<(), DecodeError> {
        let decoders = self.decoders.get_or_insert_with(|| {
            let most = if io.heap_free() < ROOM { 0 } else { usize::MAX };
            let decoder = || Decompressor::new(image.header.compression);
            Crew::new(decoder(), most, || Some(decoder()).filter(Decompressor::has_memory))
        });
        let stream = input.get(stream).unwrap_or_default();
        let size = cluster.len();
        let at = self.known.binary_search_by_key(&guest, |known| known.guest).ok();
        let at = at.filter(|&at| self.known.get(at).is_some_and(|known| known.descriptor == descriptor));
        let before = self.last.replace(guest);
        self.decoded.clear();
        self.taken = 0;
        let follows = |at: usize| at == 0 || self.known.get(at - 1).map(|known| known.guest) == before;
        let next = match at.filter(|&at| decoders.processors() > 1 && follows(at)) {
            Some(at) => self.known.get(at + 1..).unwrap_or_default(),
            None => &[],
        };
        let stream_of = |known: &Known| -> Option<&[u8]> {
            let range = CompressedRange::decode(known.descriptor, image.cluster_size());
            let start = usize::try_from(range.offset.0.checked_sub(input_at)?).ok()?;
            input.get(start..start.checked_add(usize::try_from(range.length).ok()?)?)
        };
        let next: Vec<(u64, &[u8])> = next
            .iter()
            .take(MOST / size.max(1))
            .map_while(|known| Some((known.descriptor, stream_of(known)?)))
            .collect();
        if let (true, Some(decoder)) = (next.is_empty(), decoders.own()) {
            return decoder.decompress(stream, cluster);
        }
        if self.bytes.len() < next.len() * size {
            self.bytes = vec![0; MOST.max(size)];
        }
        let mut items = vec![Item { stream, cluster, result: Ok(()) }];
        for ((_, stream), cluster) in next.iter().zip(self.bytes.chunks_exact_mut(size)) {
            items.push(Item { stream, cluster, result: Ok(()) });
        }
        decoders.for_each(&mut items, |decoder, item| item.result = decoder.decompress(item.stream, item.cluster));
        let mut results = items.iter().map(|item| item.result);
        let own = results.next().unwrap_or(Ok(()));
        for ((descriptor, _), result) in next.iter().zip(results) {
            self.decoded.push(Decoded { descriptor: *descriptor, result });
        }
        if let Some(last) = self.decoded.last() {
            let guest = self.known.iter().rev().find(|known| known.descriptor == last.descriptor);
            self.last = guest.map(|known| known.guest);
        }
        own
    }
}
