//! The sink role: planning, and writing cluster by cluster.

use crate::grow::Growth;
use crate::image::Image;
use crate::survey::{verified, Survey};
use crate::write::{decide, Writer};
use alloc::format;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageInfo, PlanSummary};
use instar_guest_sdk::table::{Action, Arriving, Disk};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, ReadBelow, Sink};
use instar_qcow_format::Entry;

/// Bytes of the heap that writing takes at most: changed sectors of tables, also as runs, and what is read from below.
const WRITING_ROOM: usize = 14 << 20;

/// What planning counted.
#[derive(Debug, Default)]
struct Planned {
    survey: Option<Survey>,
    /// Clusters that are new, and the last of them: two calls may each have a part of it.
    clusters: u64,
    last_cluster: Option<u64>,
    /// L2 tables that are new, and the index of the last of them.
    tables: u64,
    last_table: Option<u64>,
}

/// A qcow that data goes into.
#[derive(Debug)]
pub struct QcowSink {
    writer: Writer,
    max_length: u64,
    has_backing: bool,
    planned: Planned,
    growth: Option<Growth>,
}

impl QcowSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig, has_backing: bool) -> Self {
        let writer = Writer::new(image, device.flags & device_flags::FIXED_LENGTH != 0);
        Self { writer, max_length: device.max_length, has_backing, planned: Planned::default(), growth: None }
    }

    /// Verify the tables, once: what is not refused here is written over.
    fn survey(&mut self, io: &mut dyn BlockIo) -> DriverResult<Survey> {
        if let Some(survey) = self.planned.survey {
            return Ok(survey);
        }
        let survey = verified(io, &self.writer.image)?;
        let end = survey.top.checked_next_multiple_of(self.writer.image.header.cluster_size());
        self.writer.end = end.ok_or_else(|| overflow("the length of the file"))?;
        self.planned.survey = Some(survey);
        Ok(survey)
    }

    /// The disk as it will be.
    fn disk(&self) -> Disk {
        self.writer.image.disk(self.info().virtual_size)
    }

    /// The L2 table with this index, if there is one by now: the L1 table may be about to grow.
    fn table(&mut self, io: &mut dyn BlockIo, index: u64) -> DriverResult<Option<u64>> {
        if index >= self.writer.image.header.l1_entries() {
            return Ok(None);
        }
        self.writer.table(io, index)
    }

    fn plan_next(&mut self, io: &mut dyn BlockIo, disk: Disk, arriving: &Arriving<'_>) -> DriverResult<bool> {
        let parts = match arriving {
            Arriving::Zeroes(clusters) => {
                let index = clusters.start >> self.writer.image.header.l2_bits;
                return Ok(!self.has_backing && self.table(io, index)?.is_none());
            }
            Arriving::Cluster(parts) => parts,
        };
        let index = parts.cluster >> self.writer.image.header.l2_bits;
        let table = self.table(io, index)?;
        let entry = match table {
            Some(table) => self.writer.entry(io, table, parts.cluster)?,
            None => Entry::Free,
        };
        let planned = &mut self.planned;
        if decide(entry, parts.arrival(disk), self.has_backing) == Action::Allocate {
            let new_table = table.is_none() && planned.last_table.replace(index) != Some(index);
            planned.tables += u64::from(new_table);
            let is_new = planned.last_cluster.replace(parts.cluster) != Some(parts.cluster);
            planned.clusters += u64::from(is_new);
        }
        Ok(true)
    }

    fn no_space(&self, text: alloc::string::String) -> DriverError {
        DriverError::new(ErrorCode::NoSpace, text).at(self.writer.image.device, 0)
    }
}

impl Sink for QcowSink {
    fn info(&self) -> ImageInfo {
        let info = self.writer.image.info();
        let virtual_size = self.growth.map_or(info.virtual_size, |growth| growth.size.max(info.virtual_size));
        ImageInfo { virtual_size, ..info }
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        let survey = self.survey(io)?;
        self.growth = Some(Growth::plan(&self.writer.image, virtual_size, below_length, survey.beyond)?);
        Ok(())
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.survey(io)?;
        let (disk, span) = (self.disk(), self.writer.image.span());
        disk.each_cluster(span, extents, &mut |arriving| self.plan_next(io, disk, &arriving))
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let survey = self.survey(io)?;
        let free = io.heap_free();
        if free < WRITING_ROOM {
            let text = format!("writing takes {WRITING_ROOM} bytes, and of the memory of the sandbox {free} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.writer.image.device, 0));
        }
        let Writer { image, end, fixed, .. } = &self.writer;
        let size = image.header.cluster_size();
        let table = image.header.table_bytes().div_ceil(size);
        let clusters =
            self.planned.tables.checked_mul(table).and_then(|tables| tables.checked_add(self.planned.clusters));
        let bytes = clusters.and_then(|clusters| clusters.checked_mul(size));
        let growth = self.growth.map_or(0, |growth| growth.bytes(image));
        let bytes = bytes.and_then(|bytes| bytes.checked_add(growth)).ok_or_else(|| overflow("the file's length"))?;
        let used = if bytes > 0 { end.checked_add(bytes) } else { Some(survey.top) };
        let final_length = used.ok_or_else(|| overflow("the file's length"))?.max(image.file_length);
        let longest = if *fixed { image.file_length } else { self.max_length.max(image.file_length) };
        if final_length > longest {
            let text = format!("the image would become {final_length} bytes long, and there is room for {longest}");
            return Err(self.no_space(text));
        }
        Ok(PlanSummary {
            final_length,
            new_data_clusters: self.planned.clusters,
            new_metadata_clusters: self.planned.tables.saturating_mul(table),
            ..PlanSummary::default()
        })
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if let Some(growth) = self.growth.take() {
            growth.apply(io, &mut self.writer, below)?;
        }
        let disk = self.disk();
        let writer = &mut self.writer;
        disk.each_cluster(writer.image.span(), extents, &mut |arriving| match arriving {
            Arriving::Zeroes(clusters) => {
                let shows = below.exists() && disk.range(clusters.start).start < below.length();
                Ok(!shows && writer.table(io, clusters.start >> writer.image.header.l2_bits)?.is_none())
            }
            Arriving::Cluster(parts) => writer.write_cluster(io, disk, parts, below).map(|()| true),
        })?;
        self.writer.step(io)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.writer.finish(io)
    }
}
