//! The sink role: planning, and what comes before and after all writing.

use crate::growth::Growth;
use crate::image::Image;
use crate::journal::Journal;
use crate::lookup::Lookup;
use crate::verify::Survey;
use alloc::format;
use alloc::string::String;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageId, ImageInfo, PlanSummary};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, OrderedWriter, ReadBelow, Sink};
use instar_vhdx_format::{Guid, State, ALIGNMENT, BITMAP_BLOCK};

/// Bytes of the heap that writing takes at most: what a group collects, windows of the table, an entry of the log.
const WRITING_ROOM: usize = 6 << 20;

/// What planning counted.
#[derive(Debug, Default)]
struct Planned {
    /// New blocks.
    blocks: u64,
    /// The last of them: two extents may each have a part of it.
    last: Option<u64>,
    /// New sector bitmap blocks.
    bitmaps: u64,
    /// The entry of the last one that was looked at.
    slot: Option<u64>,
}

/// A VHDX that data goes into.
#[derive(Debug)]
pub struct VhdxSink {
    pub(crate) image: Image,
    pub(crate) max_length: u64,
    pub(crate) out: OrderedWriter,
    pub(crate) journal: Journal,
    pub(crate) lookup: Lookup,
    survey: Option<Survey>,
    /// Where the next block begins: whole MiB.
    pub(crate) free: u64,
    pub(crate) growth: Option<Growth>,
    planned: Planned,
    /// The DataWriteGuid that the image gets.
    data_write: Guid,
    started: bool,
}

impl VhdxSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> DriverResult<Self> {
        if image.fixed_length {
            let text = "a VHDX on a device that cannot become longer cannot be written: put it into a file";
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0));
        }
        let (out, max_length) = (OrderedWriter::new(image.device), device.max_length);
        let (journal, lookup, survey, growth, planned) = Default::default();
        let current = image.opened.headers.current.data_write;
        let keeps = device.flags & device_flags::KEEPS_IDENTITY != 0;
        let data_write = if keeps { current } else { current.next(&[]) };
        Ok(Self {
            image,
            max_length,
            out,
            journal,
            lookup,
            survey,
            free: 0,
            growth,
            planned,
            data_write,
            started: false,
        })
    }

    /// Bytes of the disk, once it has grown.
    fn size(&self) -> u64 {
        self.growth.as_ref().map_or(self.image.layout.size, |growth| growth.size)
    }

    pub(crate) fn refused(&self, text: impl Into<String>) -> DriverError {
        let place = self.image.opened.metadata_region.offset;
        DriverError::new(ErrorCode::UnsupportedFormat, text.into()).at(self.image.device, place)
    }

    /// Verify all metadata, once: what is not refused here is written over.
    pub(crate) fn verify(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.survey.is_none() {
            let survey = self.image.verify(io)?;
            self.free = survey.end;
            self.survey = Some(survey);
        }
        Ok(())
    }

    /// Count what a part of an extent within one block takes.
    fn plan_block(&mut self, io: &mut dyn BlockIo, part: &Extent, limit: u64) -> DriverResult<()> {
        let layout = self.image.layout;
        let block = part.guest_offset / layout.block_size;
        if self.planned.last == Some(block) {
            return Ok(());
        }
        let state = if block < layout.blocks() {
            self.lookup.entry(io, &self.image, block, limit)?.state()
        } else {
            Some(State::NotPresent)
        };
        let allocates = match state {
            Some(State::FullyPresent | State::PartiallyPresent) | None => false,
            Some(State::NotPresent) if part.is_zero() => layout.has_parent && part.length != layout.visible(block),
            Some(State::NotPresent) => true,
            Some(State::Zero | State::Undefined | State::Unmapped) => !part.is_zero(),
        };
        if !allocates {
            return Ok(());
        }
        self.planned.last = Some(block);
        self.planned.blocks += 1;
        let slot = layout.bitmap_entry(block);
        if layout.has_parent && self.planned.slot != Some(slot) {
            self.planned.slot = Some(slot);
            self.planned.bitmaps += u64::from(self.lookup.bitmap(io, &self.image, block)?.is_none());
        }
        Ok(())
    }

    /// Bytes that the file gets besides what it has.
    fn new_bytes(&self) -> Option<u64> {
        let blocks = self.planned.blocks.checked_mul(self.image.layout.block_size)?;
        let bitmaps = self.planned.bitmaps.checked_mul(BITMAP_BLOCK)?;
        blocks.checked_add(bitmaps)?.checked_add(self.growth.as_ref().map_or(0, Growth::new_bytes))
    }

    /// What comes before the first write: a new FileWriteGuid and DataWriteGuid, what the log has to do, and an end of what
    /// crashes have left behind the last thing in the file, which would show in new blocks. The file is cut while the log is
    /// empty (2.3.1.1).
    fn start(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if core::mem::replace(&mut self.started, true) {
            return Ok(());
        }
        let header = self.image.opened.headers.current;
        let (file_write, data_write) = (header.file_write.next_file_write(), self.data_write);
        self.image.begin(io, &mut self.out, file_write, data_write)?;
        if self.new_bytes() != Some(0) && self.image.real_length > self.free {
            self.out.set_length(io, self.free)?;
            self.image.real_length = self.free;
        }
        self.image.opened.file_length = self.image.real_length;
        self.lookup.forget();
        self.make_grow(io)
    }
}

impl Sink for VhdxSink {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.size(), ..self.image.info() }
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, _: u64) -> DriverResult<()> {
        if virtual_size <= self.size() {
            return Ok(());
        }
        self.verify(io)?;
        self.growth = Some(self.plan_growth(virtual_size)?);
        Ok(())
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.verify(io)?;
        let (size, block_size) = (self.size(), self.image.layout.block_size);
        let limit =
            extents.last().map_or(0, |extent| extent.end().div_ceil(block_size)).min(self.image.layout.blocks());
        for extent in extents {
            let place = self.image.opened.metadata_region.offset;
            extent.end_within(size).map_err(|error| error.at(self.image.device, place))?;
            for part in extent.blocks(block_size)? {
                self.plan_block(io, &part, limit)?;
            }
        }
        Ok(())
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.verify(io)?;
        let heap = io.heap_free();
        if heap < WRITING_ROOM {
            let text = format!("writing takes {WRITING_ROOM} bytes, and of the memory of the sandbox {heap} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.image.device, 0));
        }
        let too_long = || overflow("the length of the file");
        let new = self.new_bytes().ok_or_else(too_long)?;
        let end = self.free.checked_add(new).ok_or_else(too_long)?;
        let kept = self.image.opened.file_length.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_long)?;
        let final_length = if new > 0 { end.max(kept) } else { kept };
        if final_length > self.max_length.max(self.image.real_length) {
            let text = format!("the file would become {final_length} bytes long, and may have {}", self.max_length);
            return Err(self.refused(text));
        }
        let metadata = new.saturating_sub(self.planned.blocks.saturating_mul(self.image.layout.block_size));
        Ok(PlanSummary {
            final_length,
            new_data_clusters: self.planned.blocks,
            new_metadata_clusters: metadata.div_ceil(self.image.layout.block_size),
            ..PlanSummary::default()
        })
    }

    fn next_identity(&mut self, child: Option<&ImageId>) -> Option<ImageId> {
        self.data_write = self.image.opened.headers.current.data_write.next(child.map_or(&[], ImageId::as_bytes));
        ImageId::new(&self.data_write.0)
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if extents.is_empty() && self.growth.is_none() {
            return Ok(());
        }
        self.start(io)?;
        self.write_extents(io, extents, below)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.journal.is_open() {
            let file_write = self.image.opened.headers.current.file_write;
            self.journal.close(io, &mut self.image, &mut self.out, file_write)?;
        }
        self.out.barrier(io)
    }
}
