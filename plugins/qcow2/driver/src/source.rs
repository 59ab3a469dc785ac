//! The source role: enumerating what a layer holds.

use crate::bitmaps::dirty::dirty;
use crate::bitmaps::list::{list, usable};
use crate::check::mend::Mend;
use crate::check::repair::Repair as Unclean;
use crate::check::report::examine;
use crate::check::verify::{verify, Verified};
use crate::empty::empty;
use crate::image::{overflow, Image};
use crate::metadata::bitmap_directory::DirectoryEntry;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::parent::ParentChange;
use crate::read::compressed::CompressedReader;
use crate::read::extents::extents_of;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{CheckSummary, FindingKind, ImageInfo, Repair, RepairSummary};
use instar_guest_sdk::{Bitmap, BlockIo, Content, DirtyRanges, DriverResult, Extent, Extents, Parent, Source};

/// An image that data comes from.
pub struct Qcow2Source {
    image: Image,
    mapped: MappedClusters,
    /// Number of clusters that the image holds, once it was checked.
    held: Option<u64>,
    reader: CompressedReader,
    /// What has to be repaired before the image is emptied.
    repair: Option<Unclean>,
    /// How the image gets another backing file, once that was planned.
    parent: Option<ParentChange>,
    /// What is to be mended on request, once it was planned.
    mend: Option<Mend>,
    /// The bitmaps, once they were listed.
    bitmaps: Vec<DirectoryEntry>,
}

impl Qcow2Source {
    pub(crate) fn new(image: Image) -> Self {
        let (mapped, reader) = (MappedClusters::new(&image), CompressedReader::default());
        Self { image, mapped, held: None, reader, repair: None, parent: None, mend: None, bitmaps: Vec::new() }
    }

    /// Verify the whole image; returns the number of clusters that it holds.
    fn verify_whole(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        let readers = (&mut self.mapped, &mut self.reader);
        let Verified { clusters, repair } = verify(io, &self.image, readers, will_empty)?;
        if repair.is_some() {
            self.repair = repair;
        }
        Ok(clusters)
    }
}

impl Source for Qcow2Source {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.image.header.virtual_size, cluster_size: self.image.cluster_size().bytes() }
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        let held = self.verify_whole(io, will_empty)?;
        self.held = Some(held);
        Ok(held)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        // Clusters are taken whole: the last one may end after the range.
        let end = self.image.cluster_size().round_up(range.end).unwrap_or(u64::MAX);
        let mut next = end.min(self.image.header.virtual_size);
        let from = range.start;
        let (image, reader) = (&self.image, &mut self.reader);
        reader.enumerate(from);
        self.mapped.walk_range(io, image, range, &mut |mapped| {
            let mut room = true;
            extents_of(image, &mapped, &mut |extent| {
                if let Content::Encoded { location } = extent.content {
                    reader.note(image, extent.guest_offset, location);
                }
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
        self.image.refuse_unwritable()?;
        let cleared = match self.held {
            Some(clusters) => clusters,
            None => self.verify_whole(io, true)?,
        };
        // All tables that were read are about to change.
        self.mapped = MappedClusters::new(&self.image);
        self.reader = CompressedReader::default();
        self.held = None;
        empty(io, &mut self.image, cleared, self.repair.take())?;
        Ok(cleared)
    }

    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        examine(io, &self.image, finding)
    }
    fn plan_parent(&mut self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        self.parent = None;
        self.parent = Some(ParentChange::plan(io, &self.image, parent)?);
        Ok(())
    }

    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let planned = self.parent.take().ok_or_else(|| overflow("a backing file that was not planned"))?;
        planned.execute(io, &self.image)
    }

    fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        let (mend, summary) = Mend::plan(io, &self.image, repair, finding)?;
        self.mend = Some(mend);
        Ok(summary)
    }

    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let mend = self.mend.take().ok_or_else(|| overflow("a repair that was not planned"))?;
        mend.apply(io, &mut self.image)
    }

    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        let (bitmaps, entries) = list(io, &self.image, usable)?;
        self.bitmaps = entries;
        Ok(bitmaps)
    }

    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        let entry = usize::try_from(index).ok().and_then(|index| self.bitmaps.get(index));
        let entry = entry.ok_or_else(|| overflow("the number of a bitmap"))?;
        dirty(io, &self.image, &entry.bitmap, from, out)
    }
}
