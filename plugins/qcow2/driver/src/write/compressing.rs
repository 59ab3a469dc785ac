//! Windows whose clusters are compressed.
//!
//! Compressed data is never changed in place: a cluster that gets any data becomes another one, and what was there loses a
//! reference, as where a snapshot shares it. So the order of [`window`](crate::write::window) holds here, with every crash that
//! it survives; only its step 1 differs. It writes streams, which may stand behind others in a host cluster that is in use: the
//! bytes of these stay as they are, and a reference more to that cluster counts, durably, before an entry refers to it.
//!
//! A cluster that does not shrink is stored as it is, and one that is zero as a whole takes no space. The last cluster of a
//! call, of which more may arrive with the next one, is kept in memory, so that it is compressed once.

use crate::image::{overflow, Image};
use crate::write::action::{action, Action};
use crate::write::backing::Backing;
use crate::write::cluster_data::DataWriter;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::Old;
use crate::write::gather::{gather, Arrival};
use crate::write::packer::Packer;
use crate::write::remap::Remap;
use crate::write::subclusters::visible_subclusters;
use crate::write::window::{refer, MissingTables};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::{Batch, BlockIo, Content, Crew, DriverError, DriverResult, ReadBelow};
use instar_qcow2_format::{
    incompatible, CompressedRange, Compressor, GuestCluster, HostCluster, HostOffset, L2Entry, Subclusters, Version,
};

/// Bytes of the disk that are compressed between two sets of flushes.
const WINDOW_BYTES: u64 = 4 << 20;
/// Bytes of the heap that this takes at most: a window before and after, the cluster that is kept, the encoder.
const ROOM: usize = 16 << 20;
/// See [`encoders`].
const PART_OF_HEAP: usize = 3;

/// Compresses what arrives.
pub(crate) struct Compressing {
    /// Made with the first window.
    encoders: Option<Crew<Compressor>>,
    packer: Packer,
    /// The clusters of a window, and their streams.
    plain: Vec<u8>,
    streams: Vec<u8>,
    /// The last cluster, of which more may arrive.
    open: Option<Open>,
}

/// A cluster that is kept in memory.
struct Open {
    cluster: GuestCluster,
    bytes: Vec<u8>,
}

/// What a cluster becomes that data arrives in.
#[derive(Clone, Copy)]
enum Fate {
    /// It reads as zeroes already, and goes on to.
    Unchanged,
    /// All of it is zero.
    Zero,
    /// It does not shrink.
    Plain,
    /// The first `length` bytes of its stream.
    Stream { length: usize },
}

/// A cluster on its way to a stream.
struct Item<'a> {
    cluster: &'a [u8],
    /// Where the stream may be put, if it can be described: shorter than the cluster.
    stream: Option<&'a mut [u8]>,
    /// What it becomes if it is zero.
    zero: Option<Fate>,
    fate: Fate,
}

impl Item<'_> {
    fn compress(&mut self, encoder: &mut Compressor) {
        let zero = self.zero.filter(|_| self.cluster.iter().all(|&byte| byte == 0));
        self.fate = zero.unwrap_or_else(|| {
            let stream = self.stream.as_deref_mut();
            let length = stream.and_then(|stream| encoder.compress(self.cluster, stream));
            length.map_or(Fate::Plain, |length| Fate::Stream { length })
        });
    }
}

/// One encoder for each processor, as far as they take no more than a part of the heap. Each gives the same stream.
fn encoders(io: &dyn BlockIo, image: &Image, size: usize) -> Crew<Compressor> {
    let most = io.heap_free() / PART_OF_HEAP / Compressor::memory(size);
    let kind = image.header.compression;
    Crew::new(Compressor::new(kind), most, || Compressor::with_memory(kind, size))
}

/// A cluster that arrives, and what is to be done.
struct Work<'a> {
    arrival: Arrival<'a>,
    action: Action,
}

/// There is nothing below: of clusters that are known whole, nobody asks.
struct Nothing;

impl ReadBelow for Nothing {
    fn exists(&self) -> bool {
        false
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: u64, buffer: &mut [u8]) -> DriverResult<()> {
        buffer.fill(0);
        Ok(())
    }
}

impl Compressing {
    pub(crate) fn new() -> Self {
        Self { encoders: None, packer: Packer::default(), plain: Vec::new(), streams: Vec::new(), open: None }
    }

    /// Clusters of a window.
    pub(crate) fn window_clusters(image: &Image) -> u64 {
        WINDOW_BYTES / image.cluster_size().bytes()
    }

    /// Refuse to begin without the memory that it takes.
    ///
    /// # Errors
    /// [`ErrorCode::ScratchTooSmall`].
    pub(crate) fn refuse_without_room(io: &dyn BlockIo, image: &Image) -> DriverResult<()> {
        let free = io.heap_free();
        if free < ROOM {
            let text = format!("compressing takes {ROOM} bytes, and of the memory of the sandbox {free} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(image.device, 0));
        }
        Ok(())
    }

    /// Write one window, and keep its last cluster if more of that may arrive.
    ///
    /// # Errors
    /// As [`write_window`](crate::write::window::write_window).
    pub(crate) fn window(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        extents: &[ClusterExtent],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let kept = self.open.take();
        let mut parts: Vec<ClusterExtent> = Vec::with_capacity(extents.len() + 1);
        parts.extend(kept.as_ref().map(|open| open.whole(&backing.image)));
        parts.extend_from_slice(extents);
        backing.load_mapping(io, &parts)?;
        let mut all = look(backing, &parts)?;
        let goes_on = all.pop_if(|work| {
            let end =
                work.arrival.group.last().map_or((GuestCluster(0), 0), |part| (part.cluster, part.start + part.length));
            work.action.brings_data() && end.1 < backing.image.visible_bytes(end.0)
        });
        self.write(io, backing, &all, below)?;
        let Some(Work { arrival, .. }) = goes_on else { return Ok(()) };
        let Some(cluster) = arrival.group.first().map(|part| part.cluster) else { return Ok(()) };
        let size = usize::try_from(backing.image.cluster_size().bytes()).map_err(|_| overflow("the cluster size"))?;
        let mut bytes = vec![0; size];
        gather(io, backing, &[arrival], below, &mut bytes)?;
        self.open = Some(Open { cluster, bytes });
        Ok(())
    }

    /// Nothing more arrives: write the cluster that was kept.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn finish(&mut self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let parts = [open.whole(&backing.image)];
        backing.load_mapping(io, &parts)?;
        let all = look(backing, &parts)?;
        self.write(io, backing, &all, &mut Nothing)
    }

    /// Write clusters, none of which gets more; their mapping is loaded.
    fn write(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        all: &[Work<'_>],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (packed, others): (Vec<&Work<'_>>, Vec<&Work<'_>>) = all.iter().partition(|work| work.action.brings_data());
        let fates = self.compress(io, backing, &packed, below)?;

        let mut missing = MissingTables::default();
        let mut next = fates.iter();
        for work in all {
            let changes = if work.action.brings_data() {
                next.next().is_some_and(|fate| !matches!(fate, Fate::Unchanged))
            } else {
                work.action.remaps()
            };
            if let (Some(first), true) = (work.arrival.group.first(), changes) {
                missing.entry_changes(&backing.image, &backing.mapping, first.cluster)?;
            }
        }
        let tables = missing.count();
        let plain = fates.iter().filter(|fate| matches!(fate, Fate::Plain)).count();
        let mut reserved = backing.reserve(io, (tables + plain) as u64)?;
        let stale: Vec<HostCluster> =
            reserved.stale().filter(|&(index, _)| index < tables).map(|(_, cluster)| cluster).collect();
        backing.zero_clusters(io, &stale)?;
        let new_tables = missing.place(&backing.image, &mut reserved)?;

        // Step 1. Whatever brings no data takes no cluster either.
        let groups: Vec<&[ClusterExtent]> = others.iter().map(|work| work.arrival.group).collect();
        let actions: Vec<Action> = others.iter().map(|work| work.action).collect();
        let mut written = DataWriter::new(backing).write(io, &groups, &actions, &mut reserved, below)?;
        let mut places = Vec::with_capacity(plain);
        for _ in 0..plain {
            places.push(backing.image.host_offset(reserved.next()?)?);
        }
        let lengths = fates.iter().filter_map(|fate| match *fate {
            Fate::Stream { length, .. } => Some(length as u64),
            _ => None,
        });
        let offsets = self.packer.place(io, backing, &lengths.collect::<Vec<u64>>())?;
        self.write_data(io, backing, &fates, (&places, &offsets))?;
        let (mut places, mut offsets) = (places.into_iter(), offsets.into_iter());
        for (work, fate) in packed.iter().zip(&fates) {
            let place = match *fate {
                Fate::Unchanged => continue,
                Fate::Zero => None,
                Fate::Plain => places.next(),
                Fate::Stream { .. } => offsets.next(),
            };
            written.remaps.push(entry(&backing.image, work, fate, place)?);
            written.freed.extend(old(work.arrival.mapped.entry).host_clusters(backing.image.cluster_size()));
        }
        refer(io, backing, new_tables, written)
    }

    /// Gather and compress what arrives: `plain` and `streams` have it afterwards.
    fn compress(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        packed: &[&Work<'_>],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<Vec<Fate>> {
        let size = usize::try_from(backing.image.cluster_size().bytes()).map_err(|_| overflow("the cluster size"))?;
        let length = packed.len().checked_mul(size).ok_or_else(|| overflow("a window"))?;
        self.plain.clear();
        self.plain.resize(length, 0);
        self.streams.resize(length.max(self.streams.len()), 0);
        let arrivals: Vec<Arrival<'_>> = packed.iter().map(|work| work.arrival).collect();
        gather(io, backing, &arrivals, below, &mut self.plain)?;
        // Descriptors have no room for places far behind: there, clusters are stored as they are.
        let end = HostOffset(backing.image.file_length.saturating_add(2 * WINDOW_BYTES + 2 * size as u64));
        let describes = CompressedRange::encode(end, 1, backing.image.cluster_size()).is_some();
        let mut items = Vec::with_capacity(packed.len());
        let streams = self.streams.chunks_exact_mut(size);
        for ((work, cluster), stream) in packed.iter().zip(self.plain.chunks_exact(size)).zip(streams) {
            let entry = work.arrival.mapped.entry;
            let can_be_zero = backing.image.header.version == Version::V3 || !backing.has_backing;
            let unchanged = entry == L2Entry::Unallocated && !backing.has_backing;
            let zero = can_be_zero.then_some(if unchanged { Fate::Unchanged } else { Fate::Zero });
            let stream = stream.get_mut(..size - 1).filter(|_| describes);
            items.push(Item { cluster, stream, zero, fate: Fate::Plain });
        }
        let encoders = self.encoders.get_or_insert_with(|| encoders(io, &backing.image, size));
        encoders.for_each(&mut items, |encoder, item| item.compress(encoder));
        Ok(items.into_iter().map(|item| item.fate).collect())
    }

    /// Write plain clusters and streams to their places.
    fn write_data(
        &self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        fates: &[Fate],
        (places, offsets): (&[HostOffset], &[HostOffset]),
    ) -> DriverResult<()> {
        let size = usize::try_from(backing.image.cluster_size().bytes()).map_err(|_| overflow("the cluster size"))?;
        let (mut places, mut offsets) = (places.iter(), offsets.iter());
        let mut writes = Batch::new();
        for ((fate, cluster), stream) in
            fates.iter().zip(self.plain.chunks_exact(size)).zip(self.streams.chunks_exact(size))
        {
            let (bytes, place) = match *fate {
                Fate::Unchanged | Fate::Zero => continue,
                Fate::Plain => (Some(cluster), places.next()),
                Fate::Stream { length } => (stream.get(..length), offsets.next()),
            };
            let (bytes, place) = bytes.zip(place).ok_or_else(|| overflow("the place of a cluster"))?;
            writes.push(Request::write(backing.image.device, place.0, bytes.as_ptr() as u64, bytes.len() as u64));
        }
        if !writes.is_empty() {
            backing.out.written();
        }
        writes.submit(io)
    }
}

impl Open {
    /// All of it, as it is in memory.
    fn whole(&self, image: &Image) -> ClusterExtent {
        let content = Content::Memory { address: self.bytes.as_ptr() as u64 };
        ClusterExtent { cluster: self.cluster, start: 0, length: image.visible_bytes(self.cluster), content }
    }
}

/// What is to be done with each cluster; their mapping is loaded.
fn look<'a>(backing: &Backing, parts: &'a [ClusterExtent]) -> DriverResult<Vec<Work<'a>>> {
    let mut all = Vec::new();
    for group in parts.chunk_by(|a, b| a.cluster == b.cluster) {
        let Some(first) = group.first() else { continue };
        let mapped = backing.mapping.l2_entry(&backing.image, first.cluster)?;
        let action = action(&backing.image, backing.has_backing, group, &mapped);
        all.push(Work { arrival: Arrival { group, mapped }, action });
    }
    Ok(all)
}

/// What a cluster refers to no longer.
fn old(entry: L2Entry) -> Old {
    match entry {
        L2Entry::Compressed { descriptor } => Old::Compressed(descriptor),
        entry => entry.host().map_or(Old::Nothing, |(offset, _)| Old::Cluster(offset)),
    }
}

/// The entry of a cluster that data arrived in, and that stands at `place`.
fn entry(image: &Image, work: &Work<'_>, fate: &Fate, place: Option<HostOffset>) -> DriverResult<Remap> {
    let cluster = work.arrival.group.first().map_or(GuestCluster(0), |part| part.cluster);
    let extended = image.header.has(incompatible::EXTENDED_L2);
    let all = visible_subclusters(image, cluster);
    let of_all = |host, allocated, zero| Remap::extended(cluster, host, Subclusters { allocated, zero });
    Ok(match (fate, place) {
        (Fate::Stream { length, .. }, Some(at)) => {
            let descriptor = CompressedRange::encode(at, *length as u64, image.cluster_size());
            let descriptor = descriptor.ok_or_else(|| overflow("the place of a compressed cluster"))?;
            let entry = L2Entry::Compressed { descriptor }.encode();
            // No subcluster of it has a state of its own.
            Remap { cluster, entry, bitmap: extended.then_some(0) }
        }
        (Fate::Plain, Some(at)) if extended => of_all(Some((at, true)), all, 0),
        (Fate::Plain, Some(at)) => Remap::standard(cluster, L2Entry::Data { offset: at, copied: true }),
        (Fate::Zero, _) if extended => of_all(None, 0, all),
        (Fate::Zero, _) if image.header.version == Version::V3 => {
            Remap::standard(cluster, L2Entry::Zero { offset: None, copied: false })
        }
        (Fate::Zero, _) => Remap::standard(cluster, L2Entry::Unallocated),
        _ => return Err(overflow("the place of a cluster")),
    })
}
