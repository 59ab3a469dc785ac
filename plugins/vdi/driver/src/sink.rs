//! The sink role: planning, the new identity, and writing block by block.

use crate::growth::Growth;
use crate::image::{block_number, Image};
use crate::slots;
use crate::survey::{verified, Survey};
use crate::write::{decide, Writer};
use alloc::format;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageId, ImageInfo, PlanSummary};
use instar_guest_sdk::table::{Action, Arriving, ClusterParts, Disk};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, ReadBelow, Sink};
use instar_vdi_format::{Entry, Uuid};

/// Bytes of the heap that writing takes at most: changed pages of the map, also as bytes, and what is read from below.
const WRITING_ROOM: usize = 14 << 20;

/// Slots that entries can name: the two highest numbers mean something else.
const MOST_SLOTS: u64 = (1 << 32) - 2;

/// What planning counted.
#[derive(Debug, Default)]
struct Planned {
    survey: Option<Survey>,
    /// Blocks that need a slot.
    slots: u64,
    /// The last of them: two calls may each have a part of it.
    last: Option<u32>,
}

/// A VDI that data goes into.
#[derive(Debug)]
pub struct VdiSink {
    writer: Writer,
    max_length: u64,
    has_backing: bool,
    planned: Planned,
    growth: Option<Growth>,
    /// What `uuidModify` becomes.
    modify: Uuid,
    /// The new `uuidModify` is written.
    identified: bool,
}

impl VdiSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig, has_backing: bool) -> DriverResult<Self> {
        if let Some(why) = image.header.why_not_written() {
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, why).at(image.device, 0));
        }
        let fixed = device.flags & device_flags::FIXED_LENGTH != 0;
        let keeps = device.flags & device_flags::KEEPS_IDENTITY != 0;
        let modify = if keeps { image.header.modify } else { image.header.modify.next(&[]) };
        let writer = Writer::new(image, fixed);
        let planned = Planned::default();
        let max_length = device.max_length;
        Ok(Self { writer, max_length, has_backing, planned, growth: None, modify, identified: false })
    }

    /// Verify the map, once: what is not refused here is written over.
    fn survey(&mut self, io: &mut dyn BlockIo) -> DriverResult<Survey> {
        if let Some(survey) = self.planned.survey {
            return Ok(survey);
        }
        let survey = verified(io, &self.writer.image)?;
        self.writer.slots = slots::left_by(&survey);
        self.planned.survey = Some(survey);
        Ok(survey)
    }

    fn plan_block(&mut self, io: &mut dyn BlockIo, disk: Disk, arriving: &ClusterParts) -> DriverResult<()> {
        let block = block_number(arriving.cluster)?;
        let Self { writer, planned, has_backing, .. } = self;
        let Writer { image, map, .. } = writer;
        // Behind what the map has by now, everything is to read as zeroes, and nothing has a place.
        let entry =
            if block < image.header.blocks { map.get(io, image, block, image.header.blocks)? } else { Entry::Free };
        let action = decide(entry, arriving.arrival(disk), *has_backing);
        if action == Action::Allocate && planned.last.replace(block) != Some(block) {
            planned.slots += 1;
        }
        Ok(())
    }

    /// Before the first change of the content: the new `uuidModify`, durably. The overlay has recorded it already. With it,
    /// in the same sector, goes `cBlocksAllocated` as the map has it: a number that is too low, or that a crash left too
    /// high, is mended.
    fn take_identity(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if !core::mem::replace(&mut self.identified, true) {
            let header = &mut self.writer.image.header;
            header.modify = self.modify;
            self.writer.count(io)?;
            self.writer.out.barrier(io)?;
        }
        Ok(())
    }
}

impl Sink for VdiSink {
    fn info(&self) -> ImageInfo {
        let info = self.writer.image.info();
        let virtual_size = self.growth.map_or(info.virtual_size, |growth| growth.disk_size.max(info.virtual_size));
        ImageInfo { virtual_size, ..info }
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        self.survey(io)?;
        self.growth = Some(Growth::plan(io, &self.writer.image, virtual_size, below_length)?);
        Ok(())
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.survey(io)?;
        // The disk as it will be.
        let ImageInfo { virtual_size: size, cluster_size: cluster } = self.info();
        let disk = Disk { size, cluster };
        disk.each_cluster(1, extents, &mut |arriving| match arriving {
            Arriving::Zeroes(_) => Ok(false),
            Arriving::Cluster(parts) => self.plan_block(io, disk, parts).map(|()| true),
        })
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let survey = self.survey(io)?;
        let (device, free) = (self.writer.image.device, io.heap_free());
        if free < WRITING_ROOM {
            let text = format!("writing takes {WRITING_ROOM} bytes, and of the memory of the sandbox {free} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(device, 0));
        }
        let slots = &self.writer.slots;
        let (top, more) = match &self.growth {
            None => (slots.top_after(self.planned.slots), self.planned.slots),
            Some(growth) => {
                let more = growth.slots(survey.used).saturating_add(self.planned.slots);
                let begin = growth.relocation.map_or(0, |relocation| u64::from(relocation.slots));
                (slots.top_from(begin, more), more)
            }
        };
        if top > MOST_SLOTS {
            let text = format!("slot {top} would be more than the map can name");
            return Err(DriverError::new(ErrorCode::NoSpace, text).at(device, 0));
        }
        let image = &self.writer.image;
        let end = image.data_end(top).ok_or_else(|| overflow("the file's length"))?;
        let changes = more > 0 || self.growth.is_some();
        let final_length = if changes { end.max(image.file_length) } else { image.file_length };
        let longest = if self.writer.fixed { image.file_length } else { self.max_length.max(image.file_length) };
        if final_length > longest {
            let text = format!("the image would become {final_length} bytes long, and there is room for {longest}");
            return Err(DriverError::new(ErrorCode::NoSpace, text).at(device, 0));
        }
        Ok(PlanSummary { final_length, new_data_clusters: more, ..PlanSummary::default() })
    }

    fn next_identity(&mut self, child: Option<&ImageId>) -> Option<ImageId> {
        let header = &self.writer.image.header;
        self.modify = header.modify.next(child.map_or(&[], ImageId::as_bytes));
        ImageId::new(&[header.create.0, self.modify.0].concat())
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if let Some(growth) = self.growth.take() {
            growth.apply(io, &mut self.writer, below)?;
        }
        if extents.is_empty() {
            return Ok(());
        }
        self.take_identity(io)?;
        let disk = self.writer.image.disk();
        disk.each_cluster(1, extents, &mut |arriving| match arriving {
            Arriving::Zeroes(_) => Ok(false),
            Arriving::Cluster(parts) => self.writer.write_block(io, parts, below).map(|()| true),
        })?;
        self.writer.step(io)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.writer.finish(io)
    }
}
