//! The sink role: planning, and writing cluster by cluster.

use crate::grow::Growth;
use crate::image::Image;
use crate::mark::Mark;
use crate::slots::Slots;
use crate::survey::{verified, Survey};
use crate::write::Writer;
use alloc::format;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageInfo, PlanSummary};
use instar_guest_sdk::table::{Action, Arriving, Disk, Held, ZeroEntries};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, ReadBelow, Sink};

/// Bytes of the heap that writing takes at most: changed sectors of the BAT, also as runs, what is read from below, and the
/// clusters that are moved for a longer BAT.
const WRITING_ROOM: usize = 16 << 20;

/// Entries of the BAT that are looked at at once where nothing but zeroes arrives.
const SPAN: u64 = 8192;

/// What planning counted.
#[derive(Debug, Default)]
struct Planned {
    survey: Option<Survey>,
    /// Clusters that are new, and the last of them: two calls may each have a part of it.
    clusters: u64,
    last: Option<u64>,
}

/// A Parallels image that data goes into.
#[derive(Debug)]
pub struct ParallelsSink {
    writer: Writer,
    max_length: u64,
    has_backing: bool,
    planned: Planned,
    growth: Option<Growth>,
    /// It says that it is open for writing.
    mark: Option<Mark>,
}

impl ParallelsSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig, has_backing: bool) -> DriverResult<Self> {
        if !image.header.data_is_aligned() {
            let text = format!(
                "data_off is sector {}, which is not the start of a cluster of {} sectors",
                image.header.data_off, image.header.tracks
            );
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0));
        }
        let writer = Writer::new(image, device.flags & device_flags::FIXED_LENGTH != 0);
        let (planned, max_length) = (Planned::default(), device.max_length);
        Ok(Self { writer, max_length, has_backing, planned, growth: None, mark: None })
    }

    /// Verify the BAT, once: what is not refused here is written over.
    fn survey(&mut self, io: &mut dyn BlockIo) -> DriverResult<Survey> {
        if let Some(survey) = self.planned.survey {
            return Ok(survey);
        }
        let survey = verified(io, &self.writer.image)?;
        self.writer.slots = Slots::new(&self.writer.image.header, &survey);
        self.planned.survey = Some(survey);
        Ok(survey)
    }

    /// The disk as it will be.
    fn disk(&self) -> Disk {
        self.writer.image.disk(self.info().virtual_size)
    }

    fn plan_next(&mut self, io: &mut dyn BlockIo, disk: Disk, arriving: &Arriving<'_>) -> DriverResult<bool> {
        let parts = match arriving {
            Arriving::Zeroes(clusters) => return Ok(!self.has_backing && self.writer.in_hole(io, clusters)?),
            Arriving::Cluster(parts) => parts,
        };
        let held = Held::from(self.writer.place(io, parts.cluster)?);
        let action = held.decide(parts.arrival(disk), ZeroEntries::Never, self.has_backing);
        if action == Action::Allocate && self.planned.last.replace(parts.cluster) != Some(parts.cluster) {
            self.planned.clusters += 1;
        }
        Ok(true)
    }

    fn no_space(&self, text: alloc::string::String) -> DriverError {
        DriverError::new(ErrorCode::NoSpace, text).at(self.writer.image.device, 0)
    }
}

impl Sink for ParallelsSink {
    fn info(&self) -> ImageInfo {
        let info = self.writer.image.info();
        let virtual_size = self.growth.map_or(info.virtual_size, |growth| growth.size.max(info.virtual_size));
        ImageInfo { virtual_size, ..info }
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        let survey = self.survey(io)?;
        self.growth = Some(Growth::plan(io, &self.writer.image, virtual_size, below_length, &survey)?);
        Ok(())
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.survey(io)?;
        let disk = self.disk();
        disk.each_cluster(SPAN, extents, &mut |arriving| self.plan_next(io, disk, &arriving))
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.survey(io)?;
        let free = io.heap_free();
        if free < WRITING_ROOM {
            let text = format!("writing takes {WRITING_ROOM} bytes, and of the memory of the sandbox {free} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.writer.image.device, 0));
        }
        let Writer { image, slots, fixed, .. } = &self.writer;
        let (start, moved) = self.growth.as_ref().map_or((0, 0), |growth| (growth.start(), growth.moved()));
        let clusters = self.planned.clusters.checked_add(moved).ok_or_else(|| overflow("new clusters"))?;
        let end = slots.end_after(clusters, start).ok_or_else(|| overflow("the file's length"))?;
        let last = end.saturating_sub(image.header.cluster_bytes());
        if clusters > 0 && last >= slots.end() && image.header.entry(last).is_none() {
            let text =
                format!("a cluster at offset {last} of the file would be further than an entry of the BAT can say");
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0));
        }
        let changes = clusters > 0 || self.growth.is_some();
        let final_length = if changes { end.max(image.file_length) } else { image.file_length };
        let longest = if *fixed { image.file_length } else { self.max_length.max(image.file_length) };
        if final_length > longest {
            let text = format!("the image would become {final_length} bytes long, and there is room for {longest}");
            return Err(self.no_space(text));
        }
        let new_data_clusters = clusters.saturating_mul(image.units());
        Ok(PlanSummary { final_length, new_data_clusters, ..PlanSummary::default() })
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if extents.is_empty() && self.growth.is_none() {
            return Ok(());
        }
        if self.mark.is_none() {
            self.mark = Some(Mark::open(io, &mut self.writer.image, &mut self.writer.out)?);
        }
        if let Some(growth) = self.growth.take() {
            growth.apply(io, &mut self.writer, below)?;
        }
        let disk = self.disk();
        let writer = &mut self.writer;
        disk.each_cluster(SPAN, extents, &mut |arriving| match arriving {
            Arriving::Zeroes(clusters) => {
                let shows = below.exists() && disk.range(clusters.start).start < below.length();
                Ok(!shows && writer.in_hole(io, &clusters)?)
            }
            Arriving::Cluster(parts) => writer.write_cluster(io, disk, parts, below).map(|()| true),
        })?;
        self.writer.step(io)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.writer.step(io)?;
        // Though nothing was written, an interrupted run may have left its mark: the BAT was verified, as for any change.
        match self.mark.take().or_else(|| Mark::left(&self.writer.image)) {
            Some(mark) => mark.close(io, &mut self.writer.image, &mut self.writer.out),
            None => Ok(()),
        }
    }
}
