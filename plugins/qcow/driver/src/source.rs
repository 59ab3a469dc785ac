//! The source role: what an image holds, decoding it, emptying it, and a report.

use crate::decode::ClusterReader;
use crate::image::Image;
use crate::parent::ParentChange;
use crate::survey::{survey, verified};
use core::ops::Range;
use instar_guest_sdk::abi::{CheckSummary, DeviceConfig, FindingKind, ImageInfo, Request};
use instar_guest_sdk::table::{tell_findings, Big64, Table};
use instar_guest_sdk::{overflow, BlockIo, Content, DriverResult, Extent, Extents, OrderedWriter, Parent, Source};
use instar_qcow_format::{Entry, ENTRY_BYTES};

/// A qcow that data comes from.
#[derive(Debug)]
pub struct QcowSource {
    image: Image,
    l1: Table<Big64>,
    l2: Table<Big64>,
    reader: ClusterReader,
    held: u64,
    /// How the image gets another backing file, once that was planned.
    parent: Option<ParentChange>,
}

impl QcowSource {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        let table = || Table::sparse(device.device, device.cache_bytes / 2);
        Self { image, l1: table(), l2: table(), reader: ClusterReader::default(), held: 0, parent: None }
    }

    /// The extent of a cluster that the image holds, whose entry stands at byte `at` of the file.
    fn extent(&self, cluster: u64, entry: Entry) -> Option<Extent> {
        let start = cluster * self.image.header.cluster_size();
        let length = self.image.header.cluster_size().min(self.image.header.virtual_size() - start);
        let content = match entry {
            Entry::Free => return None,
            Entry::Data(offset) => Content::Data { device: self.image.device, offset },
            Entry::Compressed { .. } => Content::Encoded { location: entry.encode(self.image.header.cluster_bits) },
        };
        Some(Extent { guest_offset: start, length, content })
    }

    /// The clusters of one table, from guest byte `at` to `end`. Returns where to go on: before `end` if there is no room.
    fn table_extents(
        &mut self,
        io: &mut dyn BlockIo,
        table: u64,
        (mut at, end): (u64, u64),
        out: &mut Extents,
    ) -> DriverResult<u64> {
        let size = self.image.header.cluster_size();
        let first = self.image.l2_place(table, at / size);
        let stop = first.saturating_add((end - at).div_ceil(size) * ENTRY_BYTES);
        let mut before = 0;
        while at < end {
            let place = self.image.l2_place(table, at / size);
            let number = self.l2.get(io, place, stop)?;
            if number == 0 {
                at = at.saturating_add(self.l2.zeroes(place).saturating_mul(size));
                continue;
            }
            let entry = self.image.entry(number).map_err(|text| self.image.corrupt(place, text))?;
            if number == before && matches!(entry, Entry::Data(_)) {
                return Err(self.image.corrupt(place, "an L2 entry points to the same place as the one before it"));
            }
            before = number;
            if let Entry::Compressed { offset, length } = entry {
                self.reader.note(at - at % size, (offset, length));
            }
            if self.extent(at / size, entry).is_some_and(|extent| !out.push(extent)) {
                return Ok(at);
            }
            at = at.saturating_add(size);
        }
        Ok(at.min(end))
    }
}

impl Source for QcowSource {
    fn info(&self) -> ImageInfo {
        self.image.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        let found = verified(io, &self.image)?;
        self.held = found.held;
        Ok(found.held)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let (size, coverage) = (self.image.header.cluster_size(), self.image.header.coverage());
        let end = range.end.min(self.image.header.virtual_size());
        let l1_end = self.image.l1_place(end.div_ceil(coverage));
        let mut at = range.start - range.start % size;
        self.reader.enumerate(at);
        let mut before = 0;
        while at < end {
            let index = at / coverage;
            let place = self.image.l1_place(index);
            let number = self.l1.get(io, place, l1_end)?;
            if number == 0 {
                at = index.saturating_add(self.l1.zeroes(place)).saturating_mul(coverage);
                continue;
            }
            if number == before {
                return Err(self.image.corrupt(place, "an L1 entry points to the same table as the one before it"));
            }
            before = number;
            let table = self.image.table(number).map_err(|text| self.image.corrupt(place, text))?;
            let stop = end.min((index + 1).saturating_mul(coverage));
            at = self.table_extents(io, table, (at, stop), out)?;
            if at < stop {
                return Ok(at);
            }
            // What of the last cluster lies behind the range was pushed with it.
            at = at.next_multiple_of(size);
        }
        Ok(at.min(self.image.header.virtual_size()))
    }

    fn read(
        &mut self,
        io: &mut dyn BlockIo,
        extent: &Extent,
        guest_offset: u64,
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        let Content::Encoded { location } = extent.content else { return Err(overflow("an encoded extent")) };
        let entry = self.image.entry(location).map_err(|text| self.image.corrupt(0, text))?;
        let Entry::Compressed { offset, length } = entry else { return Err(overflow("an encoded extent")) };
        let start = guest_offset % self.image.header.cluster_size();
        self.reader.read(io, &self.image, (guest_offset - start, (offset, length)), start, buffer)
    }

    /// Tables and clusters are dropped with the L1 entries, any of them first: all read the same through the backing by now.
    /// What nothing refers to any more is cut off once that is durable: the other way round, entries would point past the
    /// end of the file. A crash between the two leaves lost space, which the next run cuts off.
    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let mut out = OrderedWriter::new(self.image.device);
        self.l1.clear(io, &mut out, &self.image.header.l1_range())?;
        self.l2.forget();
        self.reader.forget();
        let end = self.image.header.keep_end();
        if self.image.file_length > end {
            let (device, tail) = (self.image.device, self.image.file_length - end);
            // A block device keeps its length: there the space is given back by that.
            let mut requests = [Request::discard(device, end, tail), Request::set_length(device, end)];
            out.run(io, &mut requests)?;
            out.barrier(io)?;
            self.image.file_length = end;
        }
        Ok(core::mem::take(&mut self.held))
    }

    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        let image = &self.image;
        let rest = "the tables are damaged throughout: the rest was not looked at";
        let (found, corruptions) = tell_findings(finding, rest, |wrong| survey(io, image, wrong))?;
        let Some(found) = found else {
            return Ok(CheckSummary { corruptions, ..CheckSummary::default() });
        };
        if found.beyond > 0 {
            let text = alloc::format!("{} L2 entries are for clusters past the end of the disk", found.beyond);
            finding(FindingKind::Leak, &text);
        }
        let size = image.header.cluster_size();
        let unused = image.file_length.saturating_sub(found.top);
        Ok(CheckSummary {
            image_end_offset: found.top,
            total_clusters: image.disk_clusters(),
            allocated_clusters: found.held,
            fragmented_clusters: found.fragmented,
            compressed_clusters: found.compressed,
            corruptions,
            leaks: found.beyond,
            unused_tail: unused - unused % size,
        })
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
}
