//! The source role: enumerating what a layer holds.

use crate::decode::ClusterReader;
use crate::image::{overflow, Image};
use crate::repair::Repair;
use crate::scan::decode_l1;
use crate::slice_cache::SliceCache;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{Examination, Extent, ExtentKind, FindingKind, ImageInfo, Request};
use instar_guest_sdk::{BlockIo, DriverResult, Source};
use instar_qcow2_format::{incompatible, CompressedRange, EntryError, HostOffset, L2Entry, Subclusters, SUBCLUSTERS};

/// L2 tables are read in pieces of at most this many bytes …
const PIECE_BYTES: u64 = 64 << 10;
/// … and at most this many bytes of them are held at once.
const WINDOW_BYTES: u64 = 2 << 20;
/// At most this many pieces are held at once, whatever their size.
const WINDOW_PIECES: usize = 2048;
/// At most this many slices of the L1 table are held at once.
const L1_SLICES: u64 = 256;

/// A piece of an L2 table in the window.
struct Piece {
    /// Which piece of the virtual disk's mapping: guest offset divided by what a piece maps.
    index: u64,
    /// Where it stands in the file.
    host: HostOffset,
    /// Where it stands in the window's buffer.
    start: usize,
}

/// An image that data comes from.
pub struct Qcow2Source {
    pub(crate) image: Image,
    pub(crate) l1: SliceCache,
    pieces: Vec<Piece>,
    /// Pieces from `pieces[0].index` up to here are in the window, or unallocated.
    window_end: u64,
    buffer: Vec<u8>,
    /// Number of clusters that the image holds, once it was checked.
    pub(crate) held: Option<u64>,
    pub(crate) reader: ClusterReader,
    /// What has to be repaired before the image is emptied.
    pub(crate) repair: Option<Repair>,
}

impl Qcow2Source {
    pub(crate) fn new(image: Image) -> Self {
        let l1 = SliceCache::new(image.device, image.slice_size());
        let reader = ClusterReader::default();
        Self { image, l1, pieces: Vec::new(), window_end: 0, buffer: Vec::new(), held: None, reader, repair: None }
    }

    /// Bytes of a piece.
    fn piece_bytes(&self) -> u64 {
        // A small window holds more than one piece, too: sizes are powers of two.
        let room = (self.image.cache_bytes(WINDOW_BYTES) / 8).max(512);
        self.image.cluster_size().bytes().min(PIECE_BYTES).min(1 << room.ilog2())
    }

    /// Guest bytes that a piece maps.
    fn piece_coverage(&self) -> u64 {
        self.piece_bytes() / self.image.header.l2_entry_bytes() * self.image.cluster_size().bytes()
    }

    fn pieces_per_table(&self) -> u64 {
        self.image.cluster_size().bytes() / self.piece_bytes()
    }

    /// Number of pieces that map the virtual disk.
    fn piece_count(&self) -> u64 {
        self.image.mapped_size().div_ceil(self.piece_coverage())
    }

    /// L1 entry `index`, verified: an L2 table lies wholly within the file.
    pub(crate) fn l1_entry(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<Option<(HostOffset, bool)>> {
        let at = self.image.header.l1_table.0 + index * 8;
        if self.l1.entry(at).is_err() {
            // Read ahead: the tables are walked in order.
            let end = self.image.header.l1_table.0 + self.image.header.l1_bytes();
            let step = self.image.slice_size() as u64;
            let room = self.image.cache_bytes(L1_SLICES * step) / step;
            self.l1.clear();
            let first = self.l1.slice_of(at);
            self.l1.load(io, (0..room.max(1)).map(|i| first + i * step).take_while(|&slice| slice < end))?;
        }
        decode_l1(&self.image, index, at, self.l1.entry(at)?)
    }

    /// Fill the window with allocated pieces from `first` to `end`: no more of them are read than will be looked at.
    fn fill_window(&mut self, io: &mut dyn BlockIo, first: u64, end: u64) -> DriverResult<()> {
        let bytes = self.piece_bytes();
        let per_table = self.pieces_per_table();
        let size = usize::try_from(bytes).map_err(|_| overflow("the size of a piece"))?;
        let room = usize::try_from(self.image.cache_bytes(WINDOW_BYTES)).unwrap_or(usize::MAX);
        let capacity = (room / size).clamp(1, WINDOW_PIECES);
        self.pieces.clear();
        let mut index = first;
        while index < end && self.pieces.len() < capacity {
            let Some((table, _)) = self.l1_entry(io, index / per_table)? else {
                index = (index / per_table + 1) * per_table;
                continue;
            };
            let host = HostOffset(table.0 + index % per_table * bytes);
            self.pieces.push(Piece { index, host, start: self.pieces.len() * size });
            index += 1;
        }
        self.window_end = index;
        if self.buffer.is_empty() && !self.pieces.is_empty() {
            // Room for a whole window; only what is read into is ever touched.
            self.buffer = vec![0; capacity * size];
        }
        let base = self.buffer.as_mut_ptr() as u64;
        let mut requests: Vec<Request> = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            match requests.last_mut() {
                // Tables that follow each other in the file are one read.
                Some(last) if last.offset + last.length == piece.host.0 => last.length += bytes,
                _ => requests.push(Request::read(self.image.device, piece.host.0, base + piece.start as u64, bytes)),
            }
        }
        if requests.is_empty() {
            return Ok(());
        }
        let result = io.run(&mut requests);
        if result.is_err() {
            self.pieces.clear();
        }
        result
    }

    /// The next allocated piece at or after `index` and before `end`: its position in the window.
    fn next_piece(&mut self, io: &mut dyn BlockIo, index: u64, end: u64) -> DriverResult<Option<usize>> {
        let end = end.min(self.piece_count());
        let held = self.pieces.first().is_some_and(|first| first.index <= index) && index < self.window_end;
        let position = if held { self.pieces.partition_point(|piece| piece.index < index) } else { usize::MAX };
        if let Some(piece) = self.pieces.get(position) {
            return Ok((piece.index < end).then_some(position));
        }
        let from = if held { self.window_end } else { index };
        if from >= end {
            return Ok(None);
        }
        self.fill_window(io, from, end)?;
        Ok(if self.pieces.is_empty() { None } else { Some(0) })
    }

    /// Call `each` for every cluster that the layer holds anything of, from guest byte `from` on (a multiple of the
    /// cluster size), ascending, until it returns `false`.
    pub(crate) fn walk(
        &mut self,
        io: &mut dyn BlockIo,
        from: u64,
        each: &mut dyn FnMut(&Image, Mapped) -> DriverResult<bool>,
    ) -> DriverResult<()> {
        self.walk_range(io, from..self.image.header.virtual_size, each)
    }

    /// [`Qcow2Source::walk`] of the clusters that begin within a range. Tables are read for the range only.
    fn walk_range(
        &mut self,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        each: &mut dyn FnMut(&Image, Mapped) -> DriverResult<bool>,
    ) -> DriverResult<()> {
        let end = range.end.min(self.image.header.virtual_size);
        let cluster = self.image.cluster_size().bytes();
        let width = self.image.header.l2_entry_bytes();
        let step = usize::try_from(width).map_err(|_| overflow("the size of an L2 entry"))?;
        let end_piece = end.div_ceil(self.piece_coverage());
        let mut guest = range.start;
        while let Some(position) = self.next_piece(io, guest / self.piece_coverage(), end_piece)? {
            let piece = &self.pieces[position];
            let piece_guest = piece.index * self.piece_coverage();
            guest = guest.max(piece_guest);
            let first = (guest - piece_guest) / cluster;
            let length = usize::try_from(self.piece_bytes()).map_err(|_| overflow("the size of a piece"))?;
            let bytes = &self.buffer[piece.start..piece.start + length];
            let skip = usize::try_from(first).map_err(|_| overflow("an L2 index"))?;
            for (index, raw) in (0u64..).zip(bytes.chunks_exact(step)).skip(skip) {
                let guest = piece_guest + index * cluster;
                if guest >= end {
                    return Ok(());
                }
                if raw.iter().all(|&byte| byte == 0) {
                    continue;
                }
                let at = piece.host.0 + index * width;
                let (entry, subclusters) = decode_entry(&self.image, raw)
                    .map_err(|error| self.image.corrupt(at, format!("the L2 entry of guest offset {guest} {error}")))?;
                let mapped = Mapped { guest, at, entry, subclusters };
                if entry != L2Entry::Unallocated && !each(&self.image, mapped)? {
                    return Ok(());
                }
            }
            guest = piece_guest + self.piece_coverage();
        }
        Ok(())
    }

    /// Forget all tables that were read: they are about to change.
    pub(crate) fn forget_tables(&mut self) {
        self.l1.clear();
        self.pieces.clear();
        self.window_end = 0;
        self.reader = ClusterReader::default();
    }
}

/// A cluster that a layer holds something of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    /// Guest offset in bytes.
    pub(crate) guest: u64,
    /// Where the entry stands in the file, in bytes.
    pub(crate) at: u64,
    /// The entry.
    pub(crate) entry: L2Entry,
    /// The state of its subclusters, if they are not all alike.
    pub(crate) subclusters: Option<Subclusters>,
}

impl Mapped {
    /// How many bytes from the start of the host cluster are the guest's.
    pub(crate) fn data_end(&self, image: &Image) -> u64 {
        let visible = image.cluster_size().bytes().min(image.header.virtual_size - self.guest);
        match (self.entry, self.subclusters) {
            (L2Entry::Data { .. }, None) => visible,
            (L2Entry::Data { .. }, Some(subclusters)) => {
                let used = u64::from(SUBCLUSTERS - subclusters.allocated.leading_zeros());
                visible.min(image.cluster_size().bytes() / u64::from(SUBCLUSTERS) * used)
            }
            _ => 0,
        }
    }
}

/// Decode an entry of an L2 table, of 8 or of 16 bytes.
pub(crate) fn decode_entry(image: &Image, raw: &[u8]) -> Result<(L2Entry, Option<Subclusters>), EntryError> {
    let half = |bytes: Option<&[u8]>| bytes.and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    decode_halves(image, half(raw.get(..8)), half(raw.get(8..16)))
}

/// The same, from its halves; a standard entry has no second one.
pub(crate) fn decode_halves(
    image: &Image,
    entry: u64,
    bitmap: u64,
) -> Result<(L2Entry, Option<Subclusters>), EntryError> {
    if image.header.has(incompatible::EXTENDED_L2) {
        return Subclusters::decode(entry, bitmap, image.cluster_size());
    }
    L2Entry::decode(entry, image.cluster_size(), image.header.version).map(|entry| (entry, None))
}

/// What a cluster means for the reader of the layer: up to 32 extents.
fn extents_of(image: &Image, mapped: &Mapped, push: &mut dyn FnMut(Extent)) -> DriverResult<()> {
    let Mapped { guest, at, entry, subclusters } = *mapped;
    let visible = image.cluster_size().bytes().min(image.header.virtual_size - guest);
    let extent = |start: u64, length: u64, kind: ExtentKind, location: u64| Extent {
        guest_offset: guest + start,
        length: length.min(visible - start),
        location,
        kind: kind as u32,
        device: image.device,
    };
    if let L2Entry::Data { offset, .. } = entry {
        if !image.holds_bytes(offset, mapped.data_end(image)) {
            return Err(image.corrupt(
                at,
                format!("the L2 entry of guest offset {guest} points to offset {offset}, past the end of the file"),
            ));
        }
    }
    let host = entry.host().map_or(0, |(offset, _)| offset.0);
    if let Some(subclusters) = subclusters {
        let bytes = image.cluster_size().bytes() / u64::from(SUBCLUSTERS);
        for (first, count, data) in subclusters.runs() {
            let (start, length) = (u64::from(first) * bytes, u64::from(count) * bytes);
            if start < visible {
                let (kind, location) = if data { (ExtentKind::Data, host + start) } else { (ExtentKind::Zero, 0) };
                push(extent(start, length, kind, location));
            }
        }
        return Ok(());
    }
    match entry {
        L2Entry::Data { .. } => push(extent(0, visible, ExtentKind::Data, host)),
        L2Entry::Zero { .. } => push(extent(0, visible, ExtentKind::Zero, 0)),
        L2Entry::Compressed { descriptor } => {
            compressed_range(image, guest, at, descriptor)?;
            push(extent(0, visible, ExtentKind::Encoded, descriptor));
        }
        L2Entry::Unallocated => {}
    }
    Ok(())
}

/// Where a compressed cluster is, verified to lie in the file; only its last sector may be cut off.
pub(crate) fn compressed_range(image: &Image, guest: u64, at: u64, descriptor: u64) -> DriverResult<CompressedRange> {
    let range = CompressedRange::decode(descriptor, image.cluster_size());
    if image.holds_bytes(range.last_sector(), 1) {
        return Ok(range);
    }
    Err(image.corrupt(
        at,
        format!(
            "the L2 entry of guest offset {guest} points to offset {} and {} compressed bytes, past the end of the file",
            range.offset, range.length
        ),
    ))
}

/// Append an extent, or lengthen the last one where the new one goes on from it; compressed clusters stay on their
/// own.
fn push_merged(out: &mut Vec<Extent>, base: usize, extent: Extent) {
    if out.len() > base {
        if let Some(last) = out.last_mut() {
            let follows = last.guest_offset + last.length == extent.guest_offset
                && last.kind == extent.kind
                && extent.kind != ExtentKind::Encoded as u32
                && last.device == extent.device
                && (extent.kind == ExtentKind::Zero as u32 || last.location + last.length == extent.location);
            if follows {
                last.length += extent.length;
                return;
            }
        }
    }
    out.push(extent);
}

impl Source for Qcow2Source {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.image.header.virtual_size, cluster_size: self.image.cluster_size().bytes() }
    }

    fn check(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        let held = self.check_image(io, will_empty)?;
        self.held = Some(held);
        Ok(held)
    }

    fn extents(
        &mut self,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        max: usize,
        out: &mut Vec<Extent>,
    ) -> DriverResult<u64> {
        let base = out.len();
        // Clusters are taken whole: the last one may end after the range.
        let end = self.image.cluster_size().round_up(range.end).unwrap_or(u64::MAX);
        let mut next = end.min(self.image.header.virtual_size);
        let most = usize::try_from(SUBCLUSTERS).unwrap_or(usize::MAX);
        self.walk_range(io, range, &mut |image, mapped| {
            // A cluster is taken whole or not at all.
            let taken = out.len() - base;
            let needed = if mapped.subclusters.is_some() { most } else { 1 };
            if taken > 0 && taken + needed > max {
                next = mapped.guest;
                return Ok(false);
            }
            extents_of(image, &mapped, &mut |extent| push_merged(out, base, extent))?;
            Ok(true)
        })?;
        Ok(next)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let start = self.image.cluster_size().offset_in(from);
        self.reader.read(io, &self.image, (from - start, extent.location), start, buffer)
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.empty_image(io)
    }

    fn examine(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<Examination> {
        self.examine_image(io, finding)
    }
}
