//! The source role: what an image holds, and emptying it.

use crate::check::check;
use crate::image::Image;
use crate::mark::Mark;
use crate::mend;
use crate::survey::{verified, Survey};
use core::ops::Range;
use instar_guest_sdk::abi::{CheckSummary, DeviceConfig, FindingKind, ImageInfo, Repair, RepairSummary, Request};
use instar_guest_sdk::table::{Little32, Table};
use instar_guest_sdk::{overflow, BlockIo, DriverResult, Extent, Extents, OrderedWriter, Source};
use instar_parallels_format::{Header, InUse};

/// A Parallels image that data comes from.
#[derive(Debug)]
pub struct ParallelsSource {
    image: Image,
    bat: Table<Little32>,
    survey: Option<Survey>,
}

impl ParallelsSource {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        Self { image, bat: Table::sparse(device.device, device.cache_bytes), survey: None }
    }

    /// How long the file stays that holds nothing: up to the data, and at least one cluster. In a shorter one, `qemu-img check`
    /// counts each entry that is 0 as one past the end (`parallels_check_outside_image`).
    fn empty_length(&self) -> u64 {
        self.image.header.data_start().max(self.image.header.cluster_bytes())
    }

    /// Whether there is nothing to give back, and nothing that an interrupted run left to do.
    fn is_empty(&self) -> bool {
        let holds_nothing = self.survey.is_some_and(|found| found.held + found.beyond == 0);
        let Header { in_use, .. } = self.image.header;
        holds_nothing && in_use != InUse::Open && self.image.file_length <= self.empty_length()
    }
}

impl Source for ParallelsSource {
    fn info(&self) -> ImageInfo {
        self.image.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        let found = verified(io, &self.image)?;
        self.survey = Some(found);
        Ok(found.units)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let size = self.image.header.cluster_bytes();
        let (disk, clusters) = (self.image.header.virtual_size(), self.image.header.disk_clusters());
        let (mut cluster, end) = (range.start / size, range.end.div_ceil(size).min(clusters));
        let mut before = 0;
        while cluster < end {
            let at = Header::entry_place(cluster);
            let entry = self.bat.get(io, at, Header::entry_place(end))?;
            if entry == 0 {
                cluster += self.bat.zeroes(at);
                continue;
            }
            if entry == before {
                return Err(self.image.corrupt(at, "an entry of the BAT is the same as the one before it"));
            }
            before = entry;
            let place = self.image.place(entry).map_err(|text| self.image.corrupt(at, text))?;
            let start = cluster * size;
            let extent = Extent::data(start, size.min(disk - start), self.image.device, place.offset);
            if !out.push(extent) {
                return Ok(start);
            }
            cluster += 1;
        }
        Ok(cluster.saturating_mul(size).min(disk).max(range.end.min(disk)))
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Err(overflow("an encoded extent"))
    }

    /// First the image says that it is open for writing. Then the BAT: from then on everything is read from the backing, and a
    /// crash within that leaves some clusters, which read the same. With that durable, the space behind it is given back: the
    /// other way round, entries would name what is not there. With that durable, too, the image says that it was closed.
    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let held = self.survey.map_or(0, |found| found.units);
        if self.is_empty() {
            return Ok(held);
        }
        let mut out = OrderedWriter::new(self.image.device);
        let mark = Mark::open(io, &mut self.image, &mut out)?;
        self.bat.clear(io, &mut out, &self.image.bat())?;
        let (start, end) = (self.image.header.data_start(), self.empty_length());
        if self.image.file_length > end {
            let (device, tail) = (self.image.device, self.image.file_length - start);
            // A block device keeps its length: there the space is given back by that.
            let mut requests = [Request::discard(device, start, tail), Request::set_length(device, end)];
            out.run(io, &mut requests)?;
            self.image.file_length = end;
        }
        mark.close(io, &mut self.image, &mut out)?;
        self.survey = None;
        Ok(held)
    }

    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        check(io, &self.image, true, finding)
    }

    fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        mend::plan(io, &self.image, repair, finding)
    }

    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        mend::apply(io, &mut self.image)
    }
}
