//! The source role: enumerating what a layer holds.

use crate::decode::ClusterReader;
use crate::image::{overflow, Image};
use crate::l2_window::L2Window;
use crate::repair::Repair;
use alloc::format;
use core::ops::Range;
use instar_guest_sdk::abi::{Examination, FindingKind, ImageInfo};
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_qcow2_format::{incompatible, CompressedRange, EntryError, L2Entry, Subclusters, SUBCLUSTERS};

/// An image that data comes from.
pub struct Qcow2Source {
    pub(crate) image: Image,
    window: L2Window,
    /// Number of clusters that the image holds, once it was checked.
    pub(crate) held: Option<u64>,
    pub(crate) reader: ClusterReader,
    /// What has to be repaired before the image is emptied.
    pub(crate) repair: Option<Repair>,
}

impl Qcow2Source {
    pub(crate) fn new(image: Image) -> Self {
        let (window, reader) = (L2Window::new(&image), ClusterReader::default());
        Self { image, window, held: None, reader, repair: None }
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
        let mut guest = range.start;
        while let Some(piece) = self.window.next(io, &self.image, guest..end)? {
            guest = guest.max(piece.guest);
            let skip = usize::try_from((guest - piece.guest) / cluster).map_err(|_| overflow("an L2 index"))?;
            for (index, raw) in (0u64..).zip(piece.bytes.chunks_exact(step)).skip(skip) {
                let guest = piece.guest + index * cluster;
                if guest >= end {
                    return Ok(());
                }
                if raw.iter().all(|&byte| byte == 0) {
                    continue;
                }
                let at = piece.host + index * width;
                let (entry, subclusters) = decode_entry(&self.image, raw)
                    .map_err(|error| self.image.corrupt(at, format!("the L2 entry of guest offset {guest} {error}")))?;
                let mapped = Mapped { guest, at, entry, subclusters };
                if entry != L2Entry::Unallocated && !each(&self.image, mapped)? {
                    return Ok(());
                }
            }
            guest = piece.end;
        }
        Ok(())
    }

    /// Forget all tables that were read: they are about to change.
    pub(crate) fn forget_tables(&mut self) {
        self.window = L2Window::new(&self.image);
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
    let extent = |start: u64, length: u64, content: Content| Extent {
        guest_offset: guest + start,
        length: length.min(visible - start),
        content,
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
    let plain = |start: u64| Content::Data { device: image.device, offset: host + start };
    if let Some(subclusters) = subclusters {
        let bytes = image.cluster_size().bytes() / u64::from(SUBCLUSTERS);
        for (first, count, data) in subclusters.runs() {
            let (start, length) = (u64::from(first) * bytes, u64::from(count) * bytes);
            if start < visible {
                push(extent(start, length, if data { plain(start) } else { Content::Zero }));
            }
        }
        return Ok(());
    }
    match entry {
        L2Entry::Data { .. } => push(extent(0, visible, plain(0))),
        L2Entry::Zero { .. } => push(extent(0, visible, Content::Zero)),
        L2Entry::Compressed { descriptor } => {
            compressed_range(image, guest, at, descriptor)?;
            push(extent(0, visible, Content::Encoded { location: descriptor }));
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

impl Source for Qcow2Source {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.image.header.virtual_size, cluster_size: self.image.cluster_size().bytes() }
    }

    fn check(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        let held = self.check_image(io, will_empty)?;
        self.held = Some(held);
        Ok(held)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        // Clusters are taken whole: the last one may end after the range.
        let end = self.image.cluster_size().round_up(range.end).unwrap_or(u64::MAX);
        let mut next = end.min(self.image.header.virtual_size);
        let from = range.start;
        self.walk_range(io, range, &mut |image, mapped| {
            let mut room = true;
            extents_of(image, &mapped, &mut |extent| {
                // A cluster with subclusters of several states may have been left in the middle.
                if room && extent.end() > from && !out.push(extent) {
                    (next, room) = (extent.guest_offset, false);
                }
            })?;
            Ok(room)
        })?;
        Ok(next)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let Content::Encoded { location } = extent.content else { return Err(overflow("an encoded extent")) };
        let start = self.image.cluster_size().offset_in(from);
        self.reader.read(io, &self.image, (from - start, location), start, buffer)
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
