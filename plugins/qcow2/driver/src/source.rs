//! The source role: enumerating what a layer holds.

use crate::decode::ClusterReader;
use crate::image::{overflow, Image};
use crate::l2_entry::{compressed_range, Mapped};
use crate::mapped_clusters::MappedClusters;
use crate::repair::Repair;
use alloc::format;
use core::ops::Range;
use instar_guest_sdk::abi::{Examination, FindingKind, ImageInfo};
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_qcow2_format::{L2Entry, SUBCLUSTERS};

/// An image that data comes from.
pub struct Qcow2Source {
    pub(crate) image: Image,
    pub(crate) mapped: MappedClusters,
    /// Number of clusters that the image holds, once it was checked.
    pub(crate) held: Option<u64>,
    pub(crate) reader: ClusterReader,
    /// What has to be repaired before the image is emptied.
    pub(crate) repair: Option<Repair>,
}

impl Qcow2Source {
    pub(crate) fn new(image: Image) -> Self {
        let (mapped, reader) = (MappedClusters::new(&image), ClusterReader::default());
        Self { image, mapped, held: None, reader, repair: None }
    }

    /// Forget all tables that were read: they are about to change.
    pub(crate) fn forget_tables(&mut self) {
        self.mapped = MappedClusters::new(&self.image);
        self.reader = ClusterReader::default();
    }
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
        let image = &self.image;
        self.mapped.walk_range(io, image, range, &mut |mapped| {
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
